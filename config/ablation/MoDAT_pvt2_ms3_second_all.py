"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_second_all.py

The second expert of each token is always used; the base's draws it by its gate.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(fusion_block=dict(second_policy_train="all", second_policy_eval="all")))
