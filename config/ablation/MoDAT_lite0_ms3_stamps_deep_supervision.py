"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_deep_supervision.py

Mask losses on every decoder layer.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(deep_supervision=True))
