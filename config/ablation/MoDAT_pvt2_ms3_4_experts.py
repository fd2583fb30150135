"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_4_experts.py

4 experts per branch instead of 16.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(fusion_block=dict(num_experts=4)))
