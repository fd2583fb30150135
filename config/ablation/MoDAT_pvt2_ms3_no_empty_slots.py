"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_no_empty_slots.py

Channel experts leave their empty slots out of the softmax; published, they take part as zero keys and values.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(fusion_block=dict(pad_capacity=False)))
