"""bash train.sh ms3 config/ms3/MoDAT_best_ms3.py

The choices that won on the stamps (scripts/benchmark/RESULTS.md, Training), at full size; not measured on AVSBench.
"""

_base_ = ["../_base_/models/modat_best_pvt2.py", "../_base_/datasets/ms3.py", "../_base_/schedules/ms3.py"]

loss = dict(_delete_=True, type="MaskClassificationLoss")
dataset = dict(train=dict(negatives=dict(rate=0.1)))
