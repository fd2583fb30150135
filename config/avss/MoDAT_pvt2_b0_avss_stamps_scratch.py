"""bash train.sh avss config/avss/MoDAT_pvt2_b0_avss_stamps_scratch.py

Everything from random weights.
Measured in an earlier version: validation mIoU 1.5 after 4 of the 8 epochs; 8 were not run.
"""

_base_ = [
    "../_base_/models/modat_pvt2_b0_small.py",
    "../_base_/datasets/avss_stamps.py",
    "../_base_/schedules/stamps.py",
]

model = dict(head=dict(num_classes=71), num_frames=10)
