"""AVSegFormer: learned queries that attend to the sound, channel attention as fusion. The leaf names the backbone."""

model = dict(
    type="AVSegFormer",
    audio_encoder=dict(type="VGGish", frozen=True, weights="pretrained/vggish-10086976.pth", pca=False),
    head=dict(
        type="SegHead",
        num_classes=1,
        num_queries=300,
        use_learnable_queries=True,
        query_generator=dict(type="AttentionGenerator", num_layers=6),
        fusion_block=dict(type="CrossModalMixer"),
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
