"""bash train.sh s4 config/s4/AVSegFormer_res50_s4.py"""

_base_ = ["../_base_/models/avsegformer.py", "../_base_/datasets/s4.py", "../_base_/schedules/s4.py"]

model = dict(
    backbone=dict(type="res50", weights="pretrained/resnet50-19c8e357.pth"),
)
