"""From the `model` dictionary of a config to the model: read it beside the figure in the README."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from model.avs_model import AVSModel
from utils.errors import ConfigError
from utils.registry import (
    AUDIO_ENCODERS,
    AV_FUSIONS,
    BACKBONES,
    FUSIONS,
    HEADS,
    MODELS,
    POSITIONAL_ENCODINGS,
    QUERY_GENERATORS,
    TRANSFORMER_LAYERS,
    TRANSFORMERS,
    build,
    lookup,
    resolve,
    suggestion,
)


def build_model(cfg: Mapping[str, Any]) -> AVSModel:
    """Build a model.

    Args:
        cfg: `config.model`: type, backbone, vggish, head, audio_dim, embed_dim, T; published files fit.

    Returns:
        An AVSModel with pretrained backbones where the config names their files, and random weights elsewhere.

    Raises:
        ConfigError: an unknown type or key, sizes that do not fit together.
        CheckpointError: pretrained weights that are missing or do not fit.
    """
    options = dict(cfg)
    embed_dim = options.get("embed_dim", 256)
    audio_dim = options.get("audio_dim", 128)
    num_frames = options.pop("T", 5)
    if options.pop("neck", None) is not None:
        raise ConfigError("model.neck must be None: no network between backbone and head exists.")
    if not options.pop("freeze_audio_backbone", True):
        options["vggish"] = {**options.get("vggish", {}), "freeze_audio_extractor": False}
    resolve(MODELS, options, where="model")
    try:
        backbone = _build_backbone(options.pop("backbone", None))
        vggish = build(
            AUDIO_ENCODERS, {"type": "VGGish", **options.pop("vggish", {})}, where="model.vggish", audio_dim=audio_dim
        )
        head = _build_head(
            options.pop("head", None), in_channels=backbone.channels, embed_dim=embed_dim, num_frames=num_frames
        )
        model: AVSModel = build(
            MODELS, options, where="model", backbone=backbone, vggish=vggish, head=head, num_frames=num_frames
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"The config's model cannot be built: {error}.") from error
    # Maps are read as tokens, a pixel's channels side by side: weights laid out so need not be turned for each call.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _build_backbone(cfg: Mapping[str, Any] | None) -> Any:
    """A registered backbone by its type, any other type by timm's name."""
    if cfg is None or "type" not in cfg:
        raise ConfigError(f"model.backbone must name a type, 'pvt_v2_b5' for one; got {cfg!r}.")
    if lookup(BACKBONES, cfg["type"]) is not None:
        return build(BACKBONES, cfg, where="model.backbone")
    return build(BACKBONES, {**cfg, "type": "TimmBackbone"}, where="model.backbone", name=cfg["type"])


def _build_head(
    cfg: Mapping[str, Any] | None, *, in_channels: tuple[int, ...], embed_dim: int, num_frames: int
) -> nn.Module:
    resolve(HEADS, cfg, where="model.head")
    options = dict(cfg or {})
    sizes = {
        "embed_dim": embed_dim,
        "dim": embed_dim,
        "query_num": options.get("query_num", 300),
        "num_levels": len(options.get("valid_indices", (1, 2, 3))),
        "num_frames": num_frames,
    }
    query_generator = _build_query_generator(options.pop("query_generator", None), sizes)
    transformer = _build_transformer(options.pop("transformer", None), sizes)
    fusion_block = options.pop("fusion_block", None)
    if fusion_block is not None:
        fusion_block = build(FUSIONS, fusion_block, where="model.head.fusion_block", **sizes)
    positional_encoding = build(
        POSITIONAL_ENCODINGS,
        options.pop("positional_encoding", {"type": "SinePositionalEncoding"}),
        where="model.head.positional_encoding",
        num_feats=embed_dim // 2,
    )
    return build(
        HEADS,
        options,
        where="model.head",
        in_channels=in_channels,
        embed_dim=embed_dim,
        query_generator=query_generator,
        transformer=transformer,
        positional_encoding=positional_encoding,
        fusion_block=fusion_block,
    )


def _build_query_generator(cfg: Mapping[str, Any] | None, sizes: Mapping[str, Any]) -> nn.Module:
    where = "model.head.query_generator"
    resolve(QUERY_GENERATORS, cfg, where=where)
    options = dict(cfg or {})
    if options.get("early_fusion") is not None:
        options["early_fusion"] = build(AV_FUSIONS, options["early_fusion"], where=f"{where}.early_fusion", **sizes)
    return build(QUERY_GENERATORS, options, where=where, **sizes)


def _build_transformer(cfg: Mapping[str, Any] | None, sizes: Mapping[str, Any]) -> nn.Module:
    where = "model.head.transformer"
    resolve(TRANSFORMERS, cfg, where=where)
    options = dict(cfg or {})
    encoder = _build_layers("EncoderLayer", options.pop("encoder", {}), f"{where}.encoder", sizes)
    decoder = _build_layers("DecoderLayer", options.pop("decoder", {}), f"{where}.decoder", sizes)
    return build(TRANSFORMERS, options, where=where, encoder_layers=encoder, decoder_layers=decoder)


def _build_layers(kind: str, cfg: Mapping[str, Any], where: str, sizes: Mapping[str, Any]) -> list[nn.Module]:
    """`num_layers` layers of the kind, each with the options under `layer`."""
    for key in cfg:
        if key not in ("num_layers", "layer"):
            raise ConfigError(f"{where}.{key} is no option: {suggestion(key, ['num_layers', 'layer'])}")
    layer = {"type": kind, **cfg.get("layer", {})}
    return [build(TRANSFORMER_LAYERS, layer, where=f"{where}.layer", **sizes) for _ in range(cfg.get("num_layers", 6))]
