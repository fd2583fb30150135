"""Every part of MoDAT, small enough to learn from random weights on two CPU cores: PVTv2-B0, C = 128."""

model = dict(
    type="MoDAT",
    backbone=dict(type="pvt_v2_b0", init_weights_path=None, drop_path_rate=0.0),
    vggish=dict(
        freeze_audio_extractor=False,
        pretrained_vggish_model_path=None,
        channels=(16, 32, 64, 128),
        hidden_dim=256,
        batch_norm=True,
    ),
    head=dict(
        type="SegHead",
        num_classes=1,
        query_num=32,
        query_generator=dict(
            type="EncoderDecoderGenerator",
            num_layers_decoder=2,
            num_heads=4,
            hidden_dim=256,
            query_init="learned",
            early_fusion=dict(type="MTA", num_layers=3, num_heads=4, hidden_dim=256),
        ),
        fusion_block=dict(type="CSA", num_heads=4, num_experts=8, dropout=0.1, audio_tokens="all"),
        transformer=dict(
            type="Transformer",
            encoder=dict(num_layers=2, layer=dict(ffn_dim=256, dropout=0.0, num_heads=4)),
            decoder=dict(num_layers=2, layer=dict(ffn_dim=256, dropout=0.0, num_heads=4)),
        ),
        mask_hidden_dim=256,
        head_dims=(32, 16),
    ),
    audio_dim=128,
    embed_dim=128,
    T=5,
)
