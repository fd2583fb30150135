"""bash train.sh ms3 config/ablation/MoDAT_lite0_ms3_stamps_equal_queries.py

Queries that start equal, as published; the base starts them from learned embeddings.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(head=dict(query_generator=dict(query_init="repeat")))
