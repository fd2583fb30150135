"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_all_audio_tokens.py

Spatial experts attend to all audio tokens, as in the paper's figure; the published ones have one key.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(fusion_block=dict(audio_tokens="all")))
