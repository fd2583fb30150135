"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_classification.py

Each query has a class and a mask, matched with the sounding object (model/mask_classification.py).
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(deep_supervision=True, mask_head=dict(_delete_=True, type="MaskClassifier")))
loss = dict(_delete_=True, type="MaskClassificationLoss")
