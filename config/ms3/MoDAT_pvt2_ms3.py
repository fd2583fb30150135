"""bash train.sh ms3 config/ms3/MoDAT_pvt2_ms3.py

Published: mIoU 61.50, F 72.0. 60 epochs; run time not measured here, for want of the data and a GPU.
"""

_base_ = ["../_base_/models/modat_pvt2.py", "../_base_/datasets/ms3.py", "../_base_/schedules/ms3.py"]
