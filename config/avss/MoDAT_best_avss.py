"""bash train.sh avss config/avss/MoDAT_best_avss.py

The choices that won on the stamps (scripts/benchmark/RESULTS.md, Training), at full size; not measured on AVSBench.
"""

_base_ = ["../_base_/models/modat_best_pvt2.py", "../_base_/datasets/avss.py", "../_base_/schedules/avss.py"]

model = dict(head=dict(num_classes=71), num_frames=10)
loss = dict(_delete_=True, type="MaskClassificationLoss")
dataset = dict(train=dict(negatives=dict(rate=0.1)))
