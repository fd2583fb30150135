"""The small MoDAT on pretrained, frozen eyes and ears: EfficientNet-Lite0 and aiSFX, C = 96, and a head that learns."""

_base_ = "./modat_pvt2_b0_small.py"

model = dict(
    backbone=dict(_delete_=True, type="tf_efficientnet_lite0", weights="pretrained/efficientnet-lite0-57934424.pth"),
    audio_encoder=dict(_delete_=True, type="AiSFX", frozen=True, weights="pretrained/aisfx-checkpoint.pth"),
    audio_dim=512,
    audio_norm="standardise",
    embed_dim=96,
    head=dict(fusion_block=dict(residual=True), mask_head=dict(hidden_dim=128)),
)
