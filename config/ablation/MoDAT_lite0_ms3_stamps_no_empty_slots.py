"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_no_empty_slots.py

Channel experts leave their empty slots out of the softmax; published, they take part as zero keys and values.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(fusion_block=dict(pad_capacity=False)))
