"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_augmented_pictures.py

Training pictures are scaled, cropped and recoloured, alike over a clip (dataloader/augment.py).
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

dataset = dict(
    train=dict(
        augment=dict(scale=(0.8, 1.25), crop=True, colour=dict(brightness=0.3, contrast=0.3, saturation=0.3, hue=0.05))
    )
)
