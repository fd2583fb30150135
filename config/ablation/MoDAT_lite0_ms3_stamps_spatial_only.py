"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_spatial_only.py

Spatial experts alone: pixels attend to the audio tokens, and no channel is weighed.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(fusion_block=dict(branches="spatial")))
