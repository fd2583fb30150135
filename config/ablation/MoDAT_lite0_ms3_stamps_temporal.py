"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_temporal.py

A-V fusion attends to all frames of the clip together, so batches hold whole clips.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(query_generator=dict(av_fusion=dict(temporal=True))))
dataset = dict(train=dict(batch_size=2, single_frames=False))
