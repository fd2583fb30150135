"""bash train.sh ms3 config/ablation/MoDAT_pvt2_ms3_learned_queries.py

Queries that start from learned embeddings: the published ones are all equal until the learnable ones are added.
"""

_base_ = ["../ms3/MoDAT_pvt2_ms3.py"]

model = dict(head=dict(query_generator=dict(query_init="learned")))
