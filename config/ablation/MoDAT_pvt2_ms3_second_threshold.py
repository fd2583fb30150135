"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_second_threshold.py

The second expert of a token is used where its gate is above 0.2; the base's draws it by its gate.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(fusion_block=dict(second_policy_train="threshold", second_policy_eval="threshold")))
