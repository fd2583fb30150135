"""bash train.sh avss config/avss/AVSegFormer_res50_avss.py

Published: mIoU 26.58, F 31.5. 30 epochs; run time not measured here, for want of the data and a GPU.
"""

_base_ = ["../_base_/models/avsegformer.py", "../_base_/datasets/avss.py", "../_base_/schedules/avss.py"]

model = dict(
    backbone=dict(type="res50", weights="pretrained/resnet50-19c8e357.pth"),
    head=dict(num_classes=71),
    num_frames=10,
)

dataset = {split: dict(crop_img_and_mask=True, resize_pred_mask=True) for split in ("train", "val", "test")}
