"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_second_all.py

The second expert of each token is always used; the base's draws it by its gate.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(fusion_block=dict(second_policy_train="all", second_policy_eval="all")))
