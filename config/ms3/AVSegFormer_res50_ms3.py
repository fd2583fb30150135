"""bash train.sh ms3 config/ms3/AVSegFormer_res50_ms3.py

Published: mIoU 53.81, F 65.6. 60 epochs; run time not measured here, for want of the data and a GPU.
"""

_base_ = ["../_base_/models/avsegformer.py", "../_base_/datasets/ms3.py", "../_base_/schedules/ms3.py"]

model = dict(
    backbone=dict(type="res50", weights="pretrained/resnet50-19c8e357.pth"),
)
optimizer = dict(lr=2e-5)
process = dict(lr_schedule=None)
