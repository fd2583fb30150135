"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_temporal.py

A-V fusion attends to the pixels of all frames of the clip together.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(query_generator=dict(av_fusion=dict(temporal=True))))
