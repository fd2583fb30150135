"""bash train.sh ms3 config/ms3/AVSegFormer_pvt2_ms3.py

Published: mIoU 61.33, F 73.0. 60 epochs; run time not measured here, for want of the data and a GPU.
"""

_base_ = ["../_base_/models/avsegformer.py", "../_base_/datasets/ms3.py", "../_base_/schedules/ms3.py"]

model = dict(
    backbone=dict(type="pvt_v2_b5", weights="pretrained/pvt_v2_b5.pth", drop_path_rate=0.1),
)
optimizer = dict(lr=2e-5)
process = dict(lr_schedule=None)
