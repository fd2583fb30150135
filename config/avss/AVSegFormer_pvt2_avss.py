"""bash train.sh avss config/avss/AVSegFormer_pvt2_avss.py

Published: mIoU 37.31, F 42.8. 30 epochs; run time not measured here, for want of the data and a GPU.
"""

_base_ = ["../_base_/models/avsegformer.py", "../_base_/datasets/avss.py", "../_base_/schedules/avss.py"]

model = dict(
    backbone=dict(type="pvt_v2_b5", weights="pretrained/pvt_v2_b5.pth", drop_path_rate=0.1),
    head=dict(num_classes=71),
    num_frames=10,
)

dataset = {split: dict(crop_img_and_mask=True, resize_pred_mask=True) for split in ("train", "val", "test")}
