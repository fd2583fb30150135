"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_negatives.py

A fifth of the training frames hear silence, noise or an off-screen sound, and their masks are empty.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

dataset = dict(train=dict(negatives=dict(rate=0.2)))
