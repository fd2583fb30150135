"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_augmented_sounds.py

Training sounds are mixed with another clip's, made louder or quieter, and shifted in time (dataloader/augment.py).
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

dataset = dict(train=dict(augment=dict(mix=dict(rate=0.3), gain_db=6, shift_seconds=0.2)))
