"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_second_threshold.py

The second expert of a token is used where its gate is above 0.2; the base's draws it by its gate.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(fusion_block=dict(second_policy_train="threshold", second_policy_eval="threshold")))
