"""AVSegFormer: learned queries that attend to the sound, channel attention as fusion. The leaf names the backbone."""

model = dict(
    type="AVSegFormer",
    vggish=dict(
        freeze_audio_extractor=True,
        pretrained_vggish_model_path="pretrained/vggish-10086976.pth",
        preprocess_audio_to_log_mel=False,
        postprocess_log_mel_with_pca=False,
        pretrained_pca_params_path=None,
    ),
    head=dict(
        type="AVSegHead",
        num_classes=1,
        query_num=300,
        use_learnable_queries=True,
        query_generator=dict(type="AttentionGenerator", num_layers=6),
        fusion_block=dict(type="CrossModalMixer"),
        positional_encoding=dict(type="SinePositionalEncoding"),
        transformer=dict(
            type="AVSTransformer",
            encoder=dict(num_layers=6, layer=dict(ffn_dim=2048, dropout=0.1)),
            decoder=dict(num_layers=6, layer=dict(ffn_dim=2048, dropout=0.1)),
        ),
    ),
    audio_dim=128,
    embed_dim=256,
    T=5,
)
