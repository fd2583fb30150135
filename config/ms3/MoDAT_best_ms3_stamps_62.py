"""bash train.sh ms3 config/ms3/MoDAT_best_ms3_stamps_62.py

All 62 kinds of stamps, 224 pixels. Test mIoU 79.8, F 85.8 (per batch); nothing is painted on silence and noise, 2.9 %
of the pixels on off-screen sounds. 40 minutes on two busy CPU cores. The model `stamps-62` is this run, packed:

    python scripts/pack_weights.py config/ms3/MoDAT_best_ms3_stamps_62.py \\
        work_dir/MoDAT_best_ms3_stamps_62/MS3_best.pth model/packed/stamps-62.safetensors
"""

_base_ = [
    "../_base_/models/modat_lite0_small.py",
    "../_base_/datasets/ms3_stamps_62.py",
    "../_base_/schedules/stamps_frozen.py",
]

model = dict(head=dict(deep_supervision=True, mask_head=dict(_delete_=True, type="MaskClassifier")))
loss = dict(_delete_=True, type="MaskClassificationLoss")
dataset = dict(train=dict(batch_size=10, single_frames=True, negatives=dict(rate=0.1)))
process = dict(train_epochs=5, freeze_epochs=5)
