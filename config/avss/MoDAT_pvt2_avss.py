"""bash train.sh avss config/avss/MoDAT_pvt2_avss.py

Published: mIoU 37.16, F 42.4. 30 epochs; run time not measured here, for want of the data and a GPU.
"""

_base_ = ["../_base_/models/modat_pvt2.py", "../_base_/datasets/avss.py", "../_base_/schedules/avss.py"]

model = dict(head=dict(num_classes=71), num_frames=10)
