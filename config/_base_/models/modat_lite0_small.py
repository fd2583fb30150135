"""A small MoDAT on pretrained, frozen eyes and ears: EfficientNet-Lite0 and aiSFX, C = 96."""

model = dict(
    type="MoDAT",
    backbone=dict(type="tf_efficientnet_lite0", weights="pretrained/efficientnet-lite0-57934424.pth"),
    audio_encoder=dict(type="AiSFX", frozen=True, weights="pretrained/aisfx-checkpoint.pth"),
    audio_norm="standardise",
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
        fusion_block=dict(
            type="DualAttentionMoE", num_heads=4, num_experts=8, dropout=0.1, audio_tokens="all", residual=True
        ),
        transformer=dict(
            type="Transformer",
            encoder=dict(num_layers=2, layer=dict(ffn_dim=256, dropout=0.0, num_heads=4)),
            decoder=dict(num_layers=2, layer=dict(ffn_dim=256, dropout=0.0, num_heads=4)),
        ),
        mask_head=dict(type="MaskPredictor", hidden_dim=128, head_dims=(32, 16)),
    ),
    embed_dim=96,
    num_frames=5,
)
