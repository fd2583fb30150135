"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_visual_queries.py

Queries from pixels instead of sound (VCT, arXiv 2506.23623): they gather pixels, and the audio selects among them.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(
    head=dict(
        query_generator=dict(
            _delete_=True,
            type="VisualQueryGenerator",
            num_layers=2,
            num_heads=4,
            ffn_dim=256,
            av_fusion=dict(type="AVFusion", num_layers=3, num_heads=4, ffn_dim=256),
        )
    )
)
