"""MoDAT with PVTv2-B5: audio-visual disentangling queries, dual-attention mixture of experts."""

model = dict(
    type="MoDAT",
    backbone=dict(type="pvt_v2_b5", weights="pretrained/pvt_v2_b5.pth", drop_path_rate=0.1),
    audio_encoder=dict(type="VGGish", frozen=True, weights="pretrained/vggish-10086976.pth", pca=False),
    head=dict(
        type="SegHead",
        num_classes=1,
        num_queries=300,
        use_learnable_queries=True,
        query_generator=dict(
            type="EncoderDecoderGenerator",
            num_layers=3,
            query_init="repeat",
            av_fusion=dict(type="AVFusion", num_layers=3, temporal=False),
        ),
        fusion_block=dict(
            type="DualAttentionMoE",
            num_experts=16,
            dropout=0.4,
            second_policy_train="random",
            second_policy_eval="random",
            second_threshold_train=0.2,
            second_threshold_eval=0.2,
            capacity_factor_train=1.0,
            capacity_factor_eval=2.0,
            min_capacity=4,
            loss_coef=0.01,
            audio_tokens="mean",
        ),
        positional_encoding=dict(type="SinePositionalEncoding", temperature=10000.0),
        transformer=dict(
            type="Transformer",
            encoder=dict(num_layers=6, layer=dict(ffn_dim=2048, dropout=0.1)),
            decoder=dict(num_layers=6, layer=dict(ffn_dim=2048, dropout=0.1)),
        ),
        pixel_decoder=dict(type="PixelDecoder"),
        mask_head=dict(type="MaskPredictor", hidden_dim=2048, head_dims=(128, 32)),
    ),
    audio_dim=128,
    embed_dim=256,
    num_frames=5,
)
