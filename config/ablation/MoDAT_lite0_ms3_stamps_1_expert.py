"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_1_expert.py

1 expert per branch instead of 8.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(fusion_block=dict(num_experts=1)))
