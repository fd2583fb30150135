"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_dinov2_b_392.py

DINOv2 ViT-B/14 on frames of 28 x 28 patches, with a simple feature pyramid (ViTDet, arXiv 2203.16527).
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(backbone=dict(_delete_=True, type="vit_base_patch14_dinov2", weights="timm"))
dataset = {split: dict(img_size=(392, 392)) for split in ("train", "val", "test")}
process = dict(activation_checkpointing=True)
