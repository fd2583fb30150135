"""MoDAT with PVTv2-B5, repaired: queries that differ and have a class and a mask each, losses on every layer."""

_base_ = "./modat_pvt2.py"

model = dict(
    audio_encoder=dict(mark_silence=True),
    audio_norm="standardise",
    head=dict(
        num_queries=100,
        deep_supervision=True,
        query_generator=dict(query_init="learned"),
        fusion_block=dict(audio_tokens="all", residual=True),
        mask_head=dict(_delete_=True, type="MaskClassifier"),
    ),
)
