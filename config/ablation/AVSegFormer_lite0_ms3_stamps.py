"""bash train.sh ms3 config/ablation/AVSegFormer_lite0_ms3_stamps.py

AVSegFormer on the same frozen features: raw embeddings, queries that attend to the audio, a channel gate, dice.
"""

_base_ = ["../ms3/MoDAT_lite0_ms3_stamps.py"]

model = dict(
    type="AVSegFormer",
    audio_norm=None,
    head=dict(
        query_generator=dict(_delete_=True, type="AttentionGenerator", num_layers=2, num_heads=4, ffn_dim=256),
        fusion_block=dict(_delete_=True, type="CrossModalMixer", num_heads=4),
    ),
)
loss = dict(mask_loss="dice")
