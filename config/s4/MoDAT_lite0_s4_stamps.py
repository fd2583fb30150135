"""bash train.sh s4 config/s4/MoDAT_lite0_s4_stamps.py

As its ms3 sibling: test mIoU 86.7, F 93.6 (per batch) with the clips' own sound, 10.4 with another clip's; on silence
and noise nothing is painted. No clip of s4 is silent, so a fifth of the training frames hears a wrong sound. 6 minutes
on two CPU cores.
"""

_base_ = [
    "../_base_/models/modat_lite0_small.py",
    "../_base_/datasets/s4_stamps.py",
    "../_base_/schedules/stamps_frozen.py",
]

dataset = dict(train=dict(batch_size=10, single_frames=True, negatives=dict(rate=0.2)))  # 600 labelled frames per epoch
process = dict(train_epochs=15, freeze_epochs=15, start_eval_epoch=4, eval_interval=5)
