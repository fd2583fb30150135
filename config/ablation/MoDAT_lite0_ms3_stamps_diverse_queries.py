"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_diverse_queries.py

A loss that pushes the queries of a frame apart (model/query_generators.py: diversity_loss).
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(query_generator=dict(diversity_weight=0.1)))
