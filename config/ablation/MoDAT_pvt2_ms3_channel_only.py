"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_channel_only.py

Channel experts alone: the audio weighs channels, and not pixels.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(fusion_block=dict(branches="channel")))
