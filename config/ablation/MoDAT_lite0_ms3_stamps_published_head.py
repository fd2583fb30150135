"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_published_head.py

The published head: equal queries, spatial experts with one key, tokens beyond capacity become zero.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(
    head=dict(
        query_generator=dict(query_init="repeat"),
        fusion_block=dict(audio_tokens="mean", residual=False),
    )
)
