"""bash train.sh ms3 config/ms3/MoDAT_pvt2_b0_ms3_stamps_scratch.py"""

_base_ = [
    "../_base_/models/modat_pvt2_b0_small.py",
    "../_base_/datasets/ms3_stamps.py",
    "../_base_/schedules/stamps.py",
]
