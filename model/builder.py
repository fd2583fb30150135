"""Builds the model from the `model` dictionary of a config; read it beside the figure in the README."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from model.avs_model import AVSModel
from model.feature_pyramid import FeaturePyramid
from utils.errors import ConfigError
from utils.registry import MODELS, build, lookup, resolve, suggestion


def build_model(cfg: Mapping[str, Any]) -> AVSModel:
    """Build a model with random weights; `model.pretrained.load_pretrained` then reads the pretrained ones.

    Args:
        cfg: `config.model`: type, backbone, audio_encoder, head, audio_dim, embed_dim, num_frames.

    Returns:
        An AVSModel.

    Raises:
        ConfigError: an unknown type or key, or sizes that do not fit together.
    """
    options = dict(cfg)
    embed_dim, num_frames = (_size(options, key, default) for key, default in (("embed_dim", 256), ("num_frames", 5)))
    resolve(MODELS, options, where="model")
    backbone = _build_backbone(options.pop("backbone", None))
    # One map (ViT): a pyramid makes four of it, trained also while the backbone is frozen.
    neck = FeaturePyramid(backbone.channels[0], backbone.stride) if len(backbone.channels) == 1 else None
    audio_encoder = _build_audio_encoder(options.pop("audio_encoder", {}), options)
    head = _build_head(
        options.pop("head", None), in_channels=(neck or backbone).channels, embed_dim=embed_dim, num_frames=num_frames
    )
    sizes = {"audio_dim": audio_encoder.audio_dim} if hasattr(audio_encoder, "audio_dim") else {}
    parts = {"backbone": backbone, "neck": neck, "audio_encoder": audio_encoder, "head": head}
    model: AVSModel = build(MODELS, options, where="model", **parts, **sizes)
    # Feature maps are read as tokens: channels_last avoids a weight transpose per call.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build_backbone(cfg: Mapping[str, Any] | None) -> Any:
    """A registered backbone, or TimmBackbone if `type` is timm's name; `weights` is left to load_pretrained."""
    where = "model.backbone"
    if not isinstance(cfg, Mapping) or "type" not in cfg:
        raise ConfigError(f"{where} must be a dictionary with a 'type', for example 'pvt_v2_b5'; got {cfg!r}.")
    options = {key: value for key, value in cfg.items() if key != "weights"}
    if lookup(MODELS, options["type"]) is not None:
        return build(MODELS, options, where=where)
    return build(MODELS, {**options, "type": "TimmBackbone"}, where=where, name=options["type"])


def _build_audio_encoder(cfg: Mapping[str, Any], model_cfg: Mapping[str, Any]) -> nn.Module:
    """An audio encoder, with `model.audio_dim` where given; `weights` and `pca_weights` are left to load_pretrained."""
    options = {key: value for key, value in cfg.items() if key not in ("weights", "pca_weights")}
    sizes = {"audio_dim": _size(model_cfg, "audio_dim", 128)} if "audio_dim" in model_cfg else {}
    encoder: nn.Module = build(MODELS, _with_type(options, "VGGish"), where="model.audio_encoder", **sizes)
    return encoder


def _build_head(
    cfg: Mapping[str, Any] | None, *, in_channels: tuple[int, ...], embed_dim: int, num_frames: int
) -> nn.Module:
    where = "model.head"
    resolve(MODELS, cfg, where=where)
    options = dict(cfg or {})
    sizes = {
        "embed_dim": embed_dim,
        "num_queries": options.get("num_queries", 300),
        "num_classes": options.pop("num_classes", 1),
        "num_levels": len(options.get("valid_indices", (1, 2, 3))),
        "num_frames": num_frames,
    }

    positional_encoding = build(
        MODELS,
        _with_type(options.pop("positional_encoding", {}), "SinePositionalEncoding"),
        where=f"{where}.positional_encoding",
        num_feats=embed_dim // 2,
    )
    query_generator = _build_query_generator(options.pop("query_generator", None), sizes, positional_encoding)
    transformer = _build_transformer(options.pop("transformer", None), sizes)
    pixel_decoder = build(
        MODELS, _with_type(options.pop("pixel_decoder", {}), "PixelDecoder"), where=f"{where}.pixel_decoder", **sizes
    )
    fusion_block = options.pop("fusion_block", None)
    if fusion_block is not None:
        fusion_block = build(
            MODELS, fusion_block, where=f"{where}.fusion_block", positional_encoding=positional_encoding, **sizes
        )
    mask_head = build(
        MODELS, _with_type(options.pop("mask_head", {}), "MaskPredictor"), where=f"{where}.mask_head", **sizes
    )
    head: nn.Module = build(
        MODELS,
        options,
        where=where,
        in_channels=in_channels,
        query_generator=query_generator,
        transformer=transformer,
        positional_encoding=positional_encoding,
        pixel_decoder=pixel_decoder,
        fusion_block=fusion_block,
        mask_head=mask_head,
        **sizes,
    )
    return head


def _build_query_generator(
    cfg: Mapping[str, Any] | None, sizes: Mapping[str, Any], positional_encoding: nn.Module
) -> nn.Module:
    where = "model.head.query_generator"
    resolve(MODELS, cfg, where=where)
    options = dict(cfg or {})
    if options.get("av_fusion") is not None:
        options["av_fusion"] = build(MODELS, options["av_fusion"], where=f"{where}.av_fusion", **sizes)
    generator: nn.Module = build(MODELS, options, where=where, positional_encoding=positional_encoding, **sizes)
    return generator


def _build_transformer(cfg: Mapping[str, Any] | None, sizes: Mapping[str, Any]) -> nn.Module:
    where = "model.head.transformer"
    resolve(MODELS, cfg, where=where)
    options = dict(cfg or {})
    encoder = _build_layers("EncoderLayer", options.pop("encoder", {}), f"{where}.encoder", sizes)
    decoder = _build_layers("DecoderLayer", options.pop("decoder", {}), f"{where}.decoder", sizes)
    transformer: nn.Module = build(MODELS, options, where=where, encoder_layers=encoder, decoder_layers=decoder)
    return transformer


def _build_layers(kind: str, cfg: Mapping[str, Any], where: str, sizes: Mapping[str, Any]) -> list[nn.Module]:
    """`num_layers` layers, each with the options under `layer`."""
    for key in cfg:
        if key not in ("num_layers", "layer"):
            raise ConfigError(f"{where}.{key} is not an option: {suggestion(key, ['num_layers', 'layer'])}")
    layer = {"type": kind, **cfg.get("layer", {})}
    return [build(MODELS, layer, where=f"{where}.layer", **sizes) for _ in range(cfg.get("num_layers", 6))]


def _with_type(cfg: Any, default: str) -> Any:
    return {"type": default, **cfg} if isinstance(cfg, Mapping) else cfg


def _size(options: Mapping[str, Any], key: str, default: int) -> int:
    size = options.get(key, default)
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ConfigError(f"model.{key}={size!r} must be a whole number above 0.")
    return size
