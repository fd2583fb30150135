"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_repaired.py

What the published code leaves open, together: queries that differ, experts that hear all tokens and no empty slots.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(
    head=dict(
        query_generator=dict(query_init="learned", diversity_weight=0.1),
        fusion_block=dict(audio_tokens="all", pad_capacity=False, residual=True),
    )
)
