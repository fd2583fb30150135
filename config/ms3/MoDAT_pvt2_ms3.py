"""bash train.sh ms3 config/ms3/MoDAT_pvt2_ms3.py"""

_base_ = ["../_base_/models/modat_pvt2.py", "../_base_/datasets/ms3.py", "../_base_/schedules/ms3.py"]
