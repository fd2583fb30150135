"""bash train.sh s4 config/s4/MoDAT_best_s4.py

The choices that won on the stamps (scripts/benchmark/RESULTS.md, Training), at full size; not measured on AVSBench.
"""

_base_ = ["../_base_/models/modat_best_pvt2.py", "../_base_/datasets/s4.py", "../_base_/schedules/s4.py"]

loss = dict(_delete_=True, type="MaskClassificationLoss")
dataset = dict(train=dict(negatives=dict(rate=0.1)))
