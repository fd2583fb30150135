"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_mean_audio_token.py

Spatial experts with one key, as published; those of the base attend to all audio tokens.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(fusion_block=dict(audio_tokens="mean")))
