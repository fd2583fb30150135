"""bash train.sh avss config/avss/MoDAT_lite0_avss_stamps.py

As its ms3 sibling; not measured yet.
"""

_base_ = [
    "../_base_/models/modat_lite0_small.py",
    "../_base_/datasets/avss_stamps.py",
    "../_base_/schedules/stamps_frozen.py",
]

model = dict(head=dict(num_classes=71), num_frames=10)
dataset = dict(train=dict(batch_size=10, single_frames=True))
