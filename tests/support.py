"""Small models and inputs that tests of several rooms share."""

import copy
from typing import Any

import torch

LAYER = {"ffn_dim": 32, "dropout": 0.0, "num_heads": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "modat": {},
    "learned queries": {"query_generator": {"query_init": "learned"}},
    "temporal": {"query_generator": {"av_fusion": {"type": "AVFusion", "num_heads": 2, "temporal": True}}},
    "four levels": {"query_generator": {"av_fusion": {"type": "AVFusion", "num_heads": 2, "num_layers": 4}}},
    "no A-V fusion": {"query_generator": {"av_fusion": None}},
    "repeat": {"query_generator": {"_delete_": True, "type": "RepeatGenerator"}},
    "repeat with A-V fusion": {
        "query_generator": {
            "_delete_": True,
            "type": "RepeatGenerator",
            "av_fusion": {"type": "AVFusion", "num_heads": 2, "ffn_dim": 32},
        }
    },
    "attention": {"query_generator": {"_delete_": True, "type": "AttentionGenerator", "num_layers": 2, "num_heads": 2}},
    "channel": {"fusion_block": {"branches": "channel"}},
    "spatial": {"fusion_block": {"branches": "spatial", "audio_tokens": "all"}},
    "all audio tokens": {"fusion_block": {"audio_tokens": "all"}},
    "one expert": {"fusion_block": {"num_experts": 1}},
    "no padding": {"fusion_block": {"pad_capacity": False}},
    "residual": {"fusion_block": {"residual": True}},
    "threshold": {"fusion_block": {"second_policy_train": "threshold", "second_policy_eval": "threshold"}},
    "none": {"fusion_block": {"second_policy_train": "none", "second_policy_eval": "none"}},
    "all": {"fusion_block": {"second_policy_train": "all", "second_policy_eval": "all"}},
    "mixer": {"fusion_block": {"_delete_": True, "type": "CrossModalMixer", "num_heads": 2}},
    "no fusion": {"fusion_block": None},
    "no learnable query": {"use_learnable_queries": False},
    "diverse queries": {"query_generator": {"query_init": "learned", "diversity_weight": 0.1}},
    "diverse attention": {
        "query_generator": {"_delete_": True, "type": "AttentionGenerator", "num_heads": 2, "diversity_weight": 0.1}
    },
    "visual queries": {
        "query_generator": {
            "_delete_": True,
            "type": "VisualQueryGenerator",
            "num_layers": 1,
            "num_scales": 3,
            "num_heads": 2,
            "diversity_weight": 0.1,
            "av_fusion": {"type": "AVFusion", "num_heads": 2, "ffn_dim": 32},
        }
    },
    "deep supervision": {"deep_supervision": True, "transformer": {"decoder": {"num_layers": 2, "layer": LAYER}}},
    "mask classification": {"mask_head": {"_delete_": True, "type": "MaskClassifier"}},
    "mask classification, every layer": {
        "deep_supervision": True,
        "transformer": {"decoder": {"num_layers": 2, "layer": LAYER}},
        "mask_head": {"_delete_": True, "type": "MaskClassifier", "hidden_dim": 8},
    },
}
"""Changes of the head that `tiny` takes: every query generator, fusion block and policy."""


def tiny(
    change: dict[str, Any], backbone: str = "pvt_v2_b0", num_classes: int = 1, num_frames: int = 3
) -> dict[str, Any]:
    """A small MoDAT with a part of its head exchanged."""
    head: dict[str, Any] = {
        "type": "SegHead",
        "num_classes": num_classes,
        "num_queries": 6,
        "num_groups": 4,
        "mask_head": {"type": "MaskPredictor", "hidden_dim": 16, "head_dims": (8, 4)},
        "pixel_decoder": {"type": "PixelDecoder", "num_groups": 4},
        "query_generator": {
            "type": "EncoderDecoderGenerator",
            "num_layers": 2,
            "num_heads": 2,
            "ffn_dim": 32,
            "av_fusion": {"type": "AVFusion", "num_heads": 2, "ffn_dim": 32},
        },
        "fusion_block": {"type": "DualAttentionMoE", "num_heads": 2, "num_experts": 4, "dropout": 0.0},
        "transformer": {
            "type": "Transformer",
            "encoder": {"num_layers": 1, "layer": {**LAYER, "num_points": 2}},
            "decoder": {"num_layers": 1, "layer": LAYER},
        },
    }
    for key, value in copy.deepcopy(change).items():
        if isinstance(value, dict):
            head[key] = {**({} if value.pop("_delete_", False) else head[key]), **value}
        else:
            head[key] = value
    return {
        "type": "MoDAT",
        "backbone": {"type": backbone},
        "audio_encoder": {"frozen": False, "channels": (2, 4, 4, 8), "hidden_dim": 16},
        "head": head,
        "embed_dim": 16,
        "num_frames": num_frames,
    }


def example(num_frames: int, height: int = 64, width: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mel patches (N, 1, 96, 64) and frames (N, 3, H, W)."""
    draw = torch.Generator().manual_seed(5)
    return torch.randn(num_frames, 1, 96, 64, generator=draw), torch.randn(num_frames, 3, height, width, generator=draw)
