"""bash train.sh s4 config/s4/MoDAT_lite0_s4_stamps.py

As its ms3 sibling; not measured yet.
"""

_base_ = [
    "../_base_/models/modat_lite0_small.py",
    "../_base_/datasets/s4_stamps.py",
    "../_base_/schedules/stamps_frozen.py",
]

dataset = dict(train=dict(batch_size=10, single_frames=True))  # 600 labelled frames per epoch
process = dict(train_epochs=15, freeze_epochs=15, start_eval_epoch=4, eval_interval=5)
