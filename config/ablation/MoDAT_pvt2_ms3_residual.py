"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_residual.py

Tokens beyond an expert's capacity keep their feature; published, they become zero.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(fusion_block=dict(residual=True)))
