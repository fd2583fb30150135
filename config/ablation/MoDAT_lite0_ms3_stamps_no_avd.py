"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_no_avd.py

Without audio-visual disentangling: every query is the mean of the A-V fusion's audio tokens.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(
    head=dict(
        query_generator=dict(
            _delete_=True,
            type="RepeatGenerator",
            av_fusion=dict(type="AVFusion", num_layers=3, num_heads=4, ffn_dim=256),
        )
    ),
)
