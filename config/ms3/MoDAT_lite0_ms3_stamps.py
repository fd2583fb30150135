"""bash train.sh ms3 config/ms3/MoDAT_lite0_ms3_stamps.py

Test mIoU 85.3, F 90.8 (per batch) with the clips' own sound, 31.4 with another clip's; on silence nothing is painted. 8
minutes on two CPU cores, 10 with the environment.
"""

_base_ = [
    "../_base_/models/modat_lite0_small.py",
    "../_base_/datasets/ms3_stamps.py",
    "../_base_/schedules/stamps_frozen.py",
]

dataset = dict(train=dict(batch_size=10, single_frames=True))
