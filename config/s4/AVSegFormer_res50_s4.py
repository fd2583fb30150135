"""bash train.sh s4 config/s4/AVSegFormer_res50_s4.py

Published: mIoU 76.38, F 86.7. 30 epochs; run time not measured here, for want of the data and a GPU.
"""

_base_ = ["../_base_/models/avsegformer.py", "../_base_/datasets/s4.py", "../_base_/schedules/s4.py"]

model = dict(
    backbone=dict(type="res50", weights="pretrained/resnet50-19c8e357.pth"),
)
