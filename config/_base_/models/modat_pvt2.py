"""MoDAT with PVTv2-B5: audio-visual disentangling queries, dual-attention mixture of experts."""

model = dict(
    type="MoDAT",
    backbone=dict(type="pvt_v2_b5", init_weights_path="pretrained/pvt_v2_b5.pth", drop_path_rate=0.1),
    vggish=dict(
        freeze_audio_extractor=True,
        pretrained_vggish_model_path="pretrained/vggish-10086976.pth",
        preprocess_audio_to_log_mel=False,
        postprocess_log_mel_with_pca=False,
        pretrained_pca_params_path=None,
    ),
    head=dict(
        type="SegHead",
        num_classes=1,
        query_num=300,
        use_learnable_queries=True,
        query_generator=dict(
            type="EncoderDecoderGenerator",
            num_layers_decoder=3,
            query_init="repeat",
            early_fusion=dict(type="MTA", num_layers=3, temporal=False),
        ),
        fusion_block=dict(
            type="CSA",
            num_experts=16,
            dropout=0.4,
            second_policy_train="random",
            second_policy_eval="random",
            second_threshold_train=0.2,
            second_threshold_eval=0.2,
            capacity_factor_train=1.0,
            capacity_factor_eval=2.0,
            loss_coef=0.01,
            audio_tokens="mean",
        ),
        positional_encoding=dict(type="SinePositionalEncoding"),
        transformer=dict(
            type="Transformer",
            encoder=dict(num_layers=6, layer=dict(ffn_dim=2048, dropout=0.1)),
            decoder=dict(num_layers=6, layer=dict(ffn_dim=2048, dropout=0.1)),
        ),
    ),
    audio_dim=128,
    embed_dim=256,
    T=5,
)
