"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_no_avd.py

Without audio-visual disentangling: every query is the mean of the A-V fusion's audio tokens.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(
    head=dict(
        query_generator=dict(_delete_=True, type="RepeatGenerator", av_fusion=dict(type="AVFusion", num_layers=3))
    ),
)
