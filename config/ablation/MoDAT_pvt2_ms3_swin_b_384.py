"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_swin_b_384.py

Swin-B on frames of 384 pixels, with activation checkpointing.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(backbone=dict(_delete_=True, type="swin_base_patch4_window12_384", weights="timm"))
dataset = {split: dict(img_size=(384, 384)) for split in ("train", "val", "test")}
process = dict(activation_checkpointing=True)
