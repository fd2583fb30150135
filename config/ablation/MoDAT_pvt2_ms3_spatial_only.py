"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_spatial_only.py

Spatial experts alone: with one audio token, as published, each expert adds the same vector to all of its pixels.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(fusion_block=dict(branches="spatial")))
