"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_diverse_queries.py

Learned queries, and a loss that pushes the queries of a frame apart (model/query_generators.py: diversity_loss).
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(query_generator=dict(query_init="learned", diversity_weight=0.1)))
