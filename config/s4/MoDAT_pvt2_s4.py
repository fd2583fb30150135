"""bash train.sh s4 config/s4/MoDAT_pvt2_s4.py

Published: mIoU 82.41, F 90.3. 30 epochs; run time not measured here, for want of the data and a GPU.
"""

_base_ = ["../_base_/models/modat_pvt2.py", "../_base_/datasets/s4.py", "../_base_/schedules/s4.py"]
