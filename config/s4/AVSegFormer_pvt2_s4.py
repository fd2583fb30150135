"""bash train.sh s4 config/s4/AVSegFormer_pvt2_s4.py

Published: mIoU 83.06, F 90.5. 30 epochs; run time not measured here, for want of the data and a GPU.
"""

_base_ = ["../_base_/models/avsegformer.py", "../_base_/datasets/s4.py", "../_base_/schedules/s4.py"]

model = dict(
    backbone=dict(type="pvt_v2_b5", weights="pretrained/pvt_v2_b5.pth", drop_path_rate=0.1),
)
