"""bash train.sh ms3 config/ms3/MoDAT_lite0_ms3_stamps_62.py

All kinds of stamps, 224 pixels: the model behind `stamps-62`.
"""

_base_ = [
    "../_base_/models/modat_lite0_small.py",
    "../_base_/datasets/ms3_stamps_62.py",
    "../_base_/schedules/stamps_frozen.py",
]

dataset = dict(train=dict(batch_size=10, single_frames=True))
process = dict(train_epochs=5, freeze_epochs=5)
