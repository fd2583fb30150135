"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_published.py

MoDAT's published design on the same frozen features: the published head, raw embeddings, dice.
"""

_base_ = ["./MoDAT_lite0_ms3_stamps_published_head.py"]

model = dict(audio_norm=None)
loss = dict(mask_loss="dice")
