"""bash train.sh avss config/avss/MoDAT_lite0_avss_stamps.py

As its ms3 sibling: test mIoU 14.1 of at most 18.3 (12 of 70 classes occur, and the others count as 0), foreground
12.9 of at most 17.1. 13 minutes on two CPU cores.
"""

_base_ = [
    "../_base_/models/modat_lite0_small.py",
    "../_base_/datasets/avss_stamps.py",
    "../_base_/schedules/stamps_frozen.py",
]

model = dict(head=dict(num_classes=71), num_frames=10)
dataset = dict(train=dict(batch_size=10, single_frames=True))
