"""The nine published config files and four published checkpoints, reconstructed."""

import copy
import json
from pathlib import Path
from pprint import pformat
from typing import Any

import torch

from tests.reference.fill import published_state_dict
from utils.published import translate

REFERENCE = Path(__file__).parent / "reference"
TASKS = ("s4", "ms3", "avss")
MODELS = (("MoDAT", "pvt2"), ("AVSegFormer", "pvt2"), ("AVSegFormer", "res50"))
BACKBONES = {
    "pvt2": ("pvt_v2_b5", "pretrained/pvt_v2_b5.pth", [64, 128, 320, 512]),
    "res50": ("res50", "pretrained/resnet50-19c8e357.pth", [256, 512, 1024, 2048]),
}


def published_config(model: str, backbone: str, task: str) -> dict[str, Any]:
    """The sections of one published config file, with all the keys that it has."""
    modat = model == "MoDAT"
    name, weights, channels = BACKBONES[backbone]
    layer = {"dim": 256, "ffn_dim": 2048, "dropout": 0.1}
    if modat:
        early_fusion = {"type": "MTA", "num_layers": 3, "temporal": False}
        generator = {"type": "EncoderDecoderGenerator", "query_num": 300, "early_fusion": early_fusion}
    else:
        generator = {"type": "AttentionGenerator", "num_layers": 6, "query_num": 300}
    head = {
        "type": "SegHead" if modat else "AVSegHead",
        "in_channels": channels,
        "num_classes": 71 if task == "avss" else 1,
        "query_num": 300,
        "use_learnable_queries": True,
        "fusion_block": {"type": "CSA" if modat else "CrossModalMixer"},
        "query_generator": generator,
        "positional_encoding": {"type": "SinePositionalEncoding", "num_feats": 128},
        "transformer": {
            "type": "Transformer" if modat else "AVSTransformer",
            "encoder": {"num_layers": 6, "layer": layer},
            "decoder": {"num_layers": 6, "layer": layer},
        },
    }
    process = {
        "s4": {"num_works": 8, "train_epochs": 30, "freeze_epochs": 5},
        "ms3": {"num_works": 8, "train_epochs": 60, "freeze_epochs": 10},
        "avss": {"num_works": 8, "train_epochs": 30, "start_eval_epoch": 10, "eval_interval": 2, "freeze_epochs": 0},
    }[task]
    loss: dict[str, Any] = {"weight_dict": {"iou_loss": 1.0, "mix_loss": 0.1}}
    return {
        "model": {
            "type": model,
            "neck": None,
            "backbone": {"type": name, "init_weights_path": weights},
            "vggish": {
                "freeze_audio_extractor": True,
                "pretrained_vggish_model_path": "pretrained/vggish-10086976.pth",
                "preprocess_audio_to_log_mel": task == "avss" and not modat,
                "postprocess_log_mel_with_pca": False,
                "pretrained_pca_params_path": None,
            },
            "head": head,
            "audio_dim": 128,
            "embed_dim": 256,
            "freeze_audio_backbone": True,
            "T": 10 if task == "avss" else 5,
        },
        "dataset": {split: published_split(task, split, crop=not modat) for split in ("train", "val", "test")},
        "optimizer": {"type": "AdamW", "lr": 3e-5 if modat and task == "ms3" else 2e-5},
        "loss": loss if task == "avss" else {**loss, "loss_type": "dice"},
        "process": process,
    }


def published_split(task: str, split: str, *, crop: bool) -> dict[str, Any]:
    """One split of a published `dataset` section."""
    if task == "avss":
        return {
            "type": "V2Dataset",
            "split": split,
            "num_class": 71,
            "mask_num": 10,
            "crop_img_and_mask": crop,
            "crop_size": 224,
            "meta_csv_path": "data/AVSS/metadata.csv",
            "label_idx_path": "data/AVSS/label2idx.json",
            "dir_base": "data/AVSS",
            "img_size": (224, 224),
            "resize_pred_mask": crop,
            "save_pred_mask_img_size": (360, 240),
            "batch_size": 2,
        }
    folder, kind = {"s4": ("Single-source", "S4Dataset"), "ms3": ("Multi-sources", "MS3Dataset")}[task]
    return {
        "type": kind,
        "split": split,
        "anno_csv": f"data/{folder}/{task}_meta_data.csv",
        "dir_img": f"data/{folder}/{task}_data/visual_frames",
        "dir_audio_log_mel": f"data/{folder}/{task}_data/audio_log_mel",
        "dir_mask": f"data/{folder}/{task}_data/gt_masks",
        "img_size": (224, 224),
        "batch_size": 2,
    }


def write_config(sections: dict[str, Any], path: Path) -> Path:
    """Write a stand-alone config file."""
    path.write_text("\n".join(f"{name} = {pformat(value)}" for name, value in sections.items()))
    return path


def published_model_config(model: str, backbone: str, task: str) -> dict[str, Any]:
    """The `model` section of one published config file, in our terms."""
    sections = copy.deepcopy(published_config(model, backbone, task))
    translate(sections)
    translated: dict[str, Any] = sections["model"]
    return translated


def published_weights(model: str, backbone: str, num_classes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """A published checkpoint with weights drawn from the tensors' names."""
    shapes = json.loads((REFERENCE / f"{model.lower()}_{backbone}.keys.json").read_text())
    for name in ("head.fc.4.weight", "head.attn_fc.4.weight"):
        shapes[name][0] = num_classes
    return published_state_dict(shapes, seed)
