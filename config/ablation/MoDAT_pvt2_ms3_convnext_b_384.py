"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_convnext_b_384.py

ConvNeXt-B on frames of 384 pixels, with activation checkpointing.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(backbone=dict(_delete_=True, type="convnext_base.fb_in22k_ft_in1k_384", weights="timm"))
dataset = {split: dict(img_size=(384, 384)) for split in ("train", "val", "test")}
process = dict(activation_checkpointing=True)
