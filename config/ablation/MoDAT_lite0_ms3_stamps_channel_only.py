"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_channel_only.py

Channel experts alone: the audio weighs channels, and not pixels.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(fusion_block=dict(branches="channel")))
