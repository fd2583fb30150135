"""Every part of MoDAT, small enough to learn from random weights on two CPU cores: PVTv2-B0, C = 128."""

model = dict(
    type="MoDAT",
    backbone=dict(type="pvt_v2_b0", weights=None, drop_path_rate=0.0),
    audio_encoder=dict(
        type="VGGish", frozen=False, weights=None, channels=(16, 32, 64, 128), hidden_dim=256, batch_norm=True
    ),
    head=dict(
        type="SegHead",
        num_classes=1,
        num_queries=32,
        query_generator=dict(
            type="EncoderDecoderGenerator",
            num_layers=2,
            num_heads=4,
            ffn_dim=256,
            query_init="learned",
            av_fusion=dict(type="AVFusion", num_layers=3, num_heads=4, ffn_dim=256),
        ),
        fusion_block=dict(type="DualAttentionMoE", num_heads=4, num_experts=8, dropout=0.1, audio_tokens="all"),
        transformer=dict(
            type="Transformer",
            encoder=dict(num_layers=2, layer=dict(ffn_dim=256, dropout=0.0, num_heads=4)),
            decoder=dict(num_layers=2, layer=dict(ffn_dim=256, dropout=0.0, num_heads=4)),
        ),
        mask_head=dict(type="MaskPredictor", hidden_dim=256, head_dims=(32, 16)),
    ),
    audio_dim=128,
    embed_dim=128,
    num_frames=5,
)
