"""bash train.sh s4 config/s4/MoDAT_pvt2_b0_s4_stamps_scratch.py"""

_base_ = ["../_base_/models/modat_pvt2_b0_small.py", "../_base_/datasets/s4_stamps.py", "../_base_/schedules/stamps.py"]
