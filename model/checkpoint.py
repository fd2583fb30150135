"""Weights files, published and ours, and the translation between their tensor names.

Ours differ from the published ones in the names of modules, in experts, which are one stacked tensor, and in 1x1
convolutions, which are linear layers. `to_ours` and `to_published` are exact inverses.
"""

import hashlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from utils.errors import CheckpointError
from utils.files import atomic_path

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

RECORD = "record"
"""Key of the record of its origin in a weights file, see scripts/engine/provenance.py."""

NEVER_USED = re.compile(r"head\.(fpn|attn_fc)\.|backbone\.layer[34]_2\.")
"""Published tensors that are never used."""
UNUSED = re.compile(rf"{NEVER_USED.pattern}|head\.learnable_query\.|head\.query_generator\.early_fusion\.conv\.")
"""The same, and those that depend on options of the model: learnable queries, the fourth level."""

_RENAMED = [  # (ours, published): prefixes, {} stands for a number; the first match counts
    ("audio_encoder.", "vggish."),
    ("head.pixel_decoder.lateral_conv.", "head.lateral_conv."),
    ("head.pixel_decoder.out_conv.", "head.out_conv."),
    ("head.mask_head.layers.", "head.mlp.layers."),
    ("head.mask_head.reduce.", "head.fc.0."),
    ("head.mask_head.refine.", "head.fc.2."),
    ("head.mask_head.classify.", "head.fc.4."),
    ("head.transformer.encoder.layers.{}.self_attn.", "head.transformer.encoder.layers.{}.self_attn."),
    ("head.transformer.encoder.layers.{}.norm.", "head.transformer.encoder.layers.{}.norm1."),
    ("head.transformer.encoder.layers.{}.ffn.norm.", "head.transformer.encoder.layers.{}.norm2."),
    ("head.transformer.encoder.layers.{}.ffn.", "head.transformer.encoder.layers.{}."),
    ("head.transformer.decoder.layers.{}.ffn.norm.", "head.transformer.decoder.layers.{}.norm3."),
    ("head.transformer.decoder.layers.{}.ffn.linear", "head.transformer.decoder.layers.{}.linear"),
    (
        "head.query_generator.av_fusion.layers.{}.cross_attn.",
        "head.query_generator.early_fusion.layers.{}.multihead_attn.",
    ),
    ("head.query_generator.av_fusion.downsample.", "head.query_generator.early_fusion.conv."),
    ("head.query_generator.av_fusion.", "head.query_generator.early_fusion."),
    ("head.query_generator.layer_mix.", "head.query_generator.conv."),
    ("head.fusion_block.channel.router.weight", "head.fusion_block.channel_attn.gate.w_gating"),
    ("head.fusion_block.spatial.router.weight", "head.fusion_block.spatial_attn.gate.w_gating"),
]
_RESNET = [("layer3.", "layer3_1."), ("layer4.", "layer4_1.")]
_STAGES = (1, 2, 3, 4)  # of PVT; ours count from 0
_PVT = [
    ("patch_embed.", "patch_embed1."),
    *((f"stages_{stage - 1}.downsample.", f"patch_embed{stage}.") for stage in _STAGES[1:]),
    *((f"stages_{i - 1}.blocks.{{}}.mlp.dwconv.", f"block{i}.{{}}.mlp.dwconv.dwconv.") for i in _STAGES),
    *((f"stages_{stage - 1}.blocks.{{}}.", f"block{stage}.{{}}.") for stage in _STAGES),
    *((f"stages_{stage - 1}.norm.", f"norm{stage}.") for stage in _STAGES),
]
_EXPERTS = {  # ours, stacked over experts -> published, one tensor per expert
    f"head.fusion_block.{kind}.experts.{ours}": f"head.fusion_block.{kind}_attn.experts.experts.{{}}.{published}"
    for kind, ours, published in (
        ("channel", "query_weight", "q_proj.weight"),
        ("channel", "key_value_weight", "kv_proj.weight"),
        ("channel", "out_weight", "proj.weight"),
        ("channel", "out_bias", "proj.bias"),
        ("spatial", "in_weight", "attn.in_proj_weight"),
        ("spatial", "out_weight", "attn.out_proj.weight"),
    )
}
_BRANCH_SCORE = {  # ours, one row per branch -> published, one convolution per branch
    f"head.fusion_block.branch_score.{leaf}": tuple(f"head.fusion_block.gate_{branch}.{leaf}" for branch in "cs")
    for leaf in ("weight", "bias")
}
_POINTWISE = re.compile(r"head\.(mlp\.layers\.\d+|query_generator\.conv|fusion_block\.gate_[cs])\.weight")
"""Published 1x1 convolutions that are linear layers here."""


def load_weights(model: nn.Module, path_or_state_dict: str | Path | Mapping[str, Tensor]) -> None:
    """Load weights under published or our names, all of them or none.

    Args:
        model: from `model.build_model`.
        path_or_state_dict: a `.pth` or `.safetensors` file, or a state dict. Names may have the prefix `module.`.

    Raises:
        CheckpointError: the file cannot be read or does not contain tensors only, or tensors are missing, left over or
            of another shape; the message lists them.
    """
    if isinstance(path_or_state_dict, str | Path):
        origin, weights = str(path_or_state_dict), read_state_dict(path_or_state_dict)
    else:
        origin, weights = "The state dict", _without_prefix(path_or_state_dict, "module.")
    published = is_published(weights)
    expected = to_published(model.state_dict()) if published else model.state_dict()
    weights = {  # PyTorch before 0.4, and some tools, write a scalar as a vector of one
        name: tensor[0] if tensor.shape == (1,) and name in expected and expected[name].dim() == 0 else tensor
        for name, tensor in weights.items()
    }
    unused = check_weights(weights, expected, origin)
    if unused:
        log.info("%s: %d tensors that this model does not use: %s", origin, len(unused), ", ".join(unused))
    used = {name: weights[name] for name in expected}
    model.load_state_dict(to_ours(used) if published else used)


def save_weights(
    model_or_state_dict: nn.Module | Mapping[str, Tensor], path: str | Path, record: Mapping[str, Any] | None = None
) -> None:
    """Write weights atomically, as `.pth` or `.safetensors` by the path's suffix, with the record of their origin."""
    weights = model_or_state_dict.state_dict() if isinstance(model_or_state_dict, nn.Module) else model_or_state_dict
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with atomic_path(path) as part:
        if Path(path).suffix == ".safetensors":
            metadata = None if record is None else {RECORD: json.dumps(record)}
            safetensors.torch.save_file({name: tensor.clone() for name, tensor in plain.items()}, part, metadata)
        else:
            torch.save(plain if record is None else with_record(plain, record), part)


def with_record(weights: Mapping[str, Tensor], record: Mapping[str, Any]) -> dict[str, Any]:
    """What a `.pth` file of weights with a record holds; `read_state_dict` reads it as one without."""
    return {"state_dict": dict(weights), RECORD: dict(record)}


def read_record(path: str | Path) -> dict[str, Any] | None:
    """The record of a weights file, a packed model or a run's `last.ckpt`; None for files without, such as published.

    A damaged file has none either: `load_weights` says what is wrong with it.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                found = json.loads((file.metadata() or {}).get(RECORD, "null"))
        else:
            with torch.serialization.safe_globals(_NUMPY_GLOBALS):
                found = torch.load(path, map_location="cpu", weights_only=True, mmap=True).get(RECORD)
    except Exception:  # torch.load raises whatever broken bytes, or a format before PyTorch 1.6, lead it into
        return None
    return found if isinstance(found, dict) else None


def read_state_dict(path: str | Path) -> StateDict:
    """Read a weights file without running code from it.

    Args:
        path: `.pth` (also a checkpoint with weights under `state_dict` or `model`) or `.safetensors`.

    Returns:
        Names and tensors on the CPU, without the prefix `module.`.

    Raises:
        CheckpointError: the file is missing, damaged, or contains anything but tensors.
    """
    content = read_file(path)
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path} holds no weights: expected a dictionary of names and tensors.")
    return _without_prefix(_without_prefix(content, "module."), "model.")


def convert(source: str | Path, target: str | Path, *, to_published_names: bool) -> tuple[int, int]:
    """Rewrite a weights file under our or the published names, as `.pth` or `.safetensors` by its suffix.

    Returns:
        The numbers of tensors written and of unused tensors left out.

    Raises:
        CheckpointError: the source cannot be read, or is not a checkpoint of MoDAT or AVSegFormer.
    """
    weights = read_state_dict(source)
    published = is_published(weights)
    if not published and not any(name.startswith("head.mask_head.") for name in weights):
        raise CheckpointError(f"{source} is not a checkpoint of MoDAT or AVSegFormer, neither published nor ours.")
    used = {name: tensor for name, tensor in weights.items() if not (published and NEVER_USED.match(name))}
    if published and not to_published_names:
        converted = to_ours(used)
    elif to_published_names and not published:
        converted = to_published(used)
    else:
        converted = used
    save_weights(converted, target, None if to_published_names else read_record(source))
    return len(converted), len(weights) - len(used)


def is_published(weights: Iterable[str]) -> bool:
    """Whether tensor names are those of a published checkpoint."""
    return any(name.startswith(("vggish.", "head.lateral_conv.", "head.mlp.layers.")) for name in weights)


def to_published(ours: Mapping[str, Tensor]) -> StateDict:
    """Our weights under published names and shapes."""
    rename = _renamer(ours, to_published=True)
    published: StateDict = {}
    for name, tensor in ours.items():
        if name in _EXPERTS:
            published |= {_EXPERTS[name].format(i): expert for i, expert in enumerate(tensor)}
        elif name in _BRANCH_SCORE:
            published |= dict(zip(_BRANCH_SCORE[name], tensor.split(1), strict=True))
        else:
            published[rename(name)] = tensor
    return {
        name: tensor[:, :, None, None] if _POINTWISE.fullmatch(name) else tensor for name, tensor in published.items()
    }


def to_ours(published: Mapping[str, Tensor]) -> StateDict:
    """Published weights under our names and shapes."""
    rename = _renamer(published, to_published=False)
    linear = {name: tensor.flatten(1) if _POINTWISE.fullmatch(name) else tensor for name, tensor in published.items()}
    ours: StateDict = {}
    for name, pattern in _EXPERTS.items():
        experts: list[Tensor] = []
        while (expert := pattern.format(len(experts))) in linear:
            experts.append(linear.pop(expert))
        if experts:
            ours[name] = torch.stack(experts)
    for name, branches in _BRANCH_SCORE.items():
        if all(branch in linear for branch in branches):
            ours[name] = torch.cat([linear.pop(branch) for branch in branches])
    return ours | {rename(name): tensor for name, tensor in linear.items()}


def check_weights(weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], origin: str) -> list[str]:
    """Compare weights with those of a model by name and shape.

    Returns:
        Names of left-over tensors that the model may do without (UNUSED).

    Raises:
        CheckpointError: anything else differs; the message starts with `origin`, the source of the weights.
    """
    missing = [name for name in expected if name not in weights]
    left_over = [name for name in weights if name not in expected]
    unused = [name for name in left_over if UNUSED.match(name)]
    unknown = [name for name in left_over if not UNUSED.match(name)]
    reshaped = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:20])}{', ...' if len(names) > 20 else ''}"
        for kind, names in (("missing", missing), ("left over", unknown), ("of another shape", reshaped))
        if names
    ]
    if faults:
        raise CheckpointError(f"{origin} does not fit the model: {'; '.join(faults)}.")
    return unused


def weights_hash(module: nn.Module) -> str:
    """A name that identifies a module's weights and constants."""
    digest = hashlib.sha256()
    for name, tensor in sorted({**module.state_dict(), **dict(module.named_buffers())}.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_file(path: str | Path) -> Any:
    """Read a `.pth` or `.safetensors` file of tensors or float arrays, on the CPU, without running code from it.

    Raises:
        CheckpointError: see read_state_dict.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"There is no weights file {path}: put it there, or set its path in the config to None.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_NUMPY_GLOBALS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{path} contains more than tensors and was not loaded: {reason}") from error
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged or not a weights file: {str(error).splitlines()[0]}") from error


_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
# Globals of pickled arrays and numbers: VGGish's PCA parameters are distributed as arrays, aiSFX's file holds numbers.
_NUMPY_GLOBALS: list[Any] = [
    np.ndarray,
    np.dtype,
    (_RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (_RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    (_SCALAR, "numpy.core.multiarray.scalar"),
    (_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("float32", "float64", "int64")),
]


def _without_prefix(weights: Mapping[str, Tensor], prefix: str) -> StateDict:
    if weights and all(name.startswith(prefix) for name in weights):
        return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return dict(weights)


def backbone_to_ours(weights: Mapping[str, Tensor]) -> StateDict:
    """A backbone's own weights, as AVSBench or timm name them, under the names of `TimmBackbone.network`."""
    # timm's classifiers name their stages stages.0, its feature extractors stages_0.
    weights = {re.sub(r"^stages\.(\d)", r"stages_\1", name): tensor for name, tensor in weights.items()}
    rename = _renamer([f"backbone.{name}" for name in weights], to_published=False)
    return {
        rename(f"backbone.{name}").removeprefix("backbone.").removeprefix("network."): tensor
        for name, tensor in weights.items()
    }


def _renamer(names: Iterable[str], *, to_published: bool) -> Callable[[str], str]:
    """The renaming for the backbone (PVT, ResNet or timm) whose tensors are among `names`."""
    names = list(names)
    if any(
        name.startswith(("backbone.patch_embed1.", "backbone.network.stages_0.blocks.0.attn.sr.")) for name in names
    ):
        backbone = _PVT
    elif any(name.startswith(("backbone.bn1.", "backbone.network.bn1.")) for name in names):
        backbone = _RESNET
    else:
        backbone = []
    pairs = [
        *((f"backbone.network.{ours}", f"backbone.{published}") for ours, published in backbone),
        *([("backbone.network.", "backbone.")] if backbone else []),
        *_RENAMED,
    ]
    rules = [(_template(pair[not to_published]), pair[to_published]) for pair in pairs]

    def rename(name: str) -> str:
        for pattern, target in rules:
            if match := pattern.match(name):
                return target.format(*match.groups()) + name[match.end() :]
        return name

    return rename


def _template(prefix: str) -> re.Pattern[str]:
    return re.compile(re.escape(prefix).replace(r"\{\}", r"(\d+)"))
