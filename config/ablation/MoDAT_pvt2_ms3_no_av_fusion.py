"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_no_av_fusion.py

Without A-V fusion: the queries are decoded from the audio token alone, which has not met the pixels.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(query_generator=dict(av_fusion=None)))
