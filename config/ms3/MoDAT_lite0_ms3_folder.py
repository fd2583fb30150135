"""bash train.sh ms3 config/ms3/MoDAT_lite0_ms3_folder.py

The small MoDAT on videos and masks of your own, data/mine/clips.csv; no score to expect. For s4, set `task="s4"` in
each split, here in a copy; for avss also `num_classes`, and in the model `num_frames` and `head.num_classes`.
"""

_base_ = [
    "../_base_/models/modat_lite0_small.py",
    "../_base_/datasets/folder.py",
    "../_base_/schedules/stamps_frozen.py",
]
