"""One exported file: written, read back, and compared with the model before it takes its name."""

import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.export import ExportedProgram

from dataloader.front_ends import front_end
from dataloader.images import IMAGENET_MEAN, IMAGENET_STD
from model.avs_model import AVSModel
from scripts.exporting.check import TOLERANCE, check_agreement
from scripts.exporting.formats import FORMATS, Run
from scripts.exporting.graph import Inputs, reason, trace
from scripts.prediction.model import class_names, frame_size
from utils.errors import ConfigError
from utils.registry import suggestion


class Exported(NamedTuple):
    """A file that agrees with its model.

    Attributes:
        path: the file.
        run: (log_mel, frames) -> logits, from the file.
        metadata: what the file says of itself.
        difference: largest of the logits from the model's, on random inputs.
        program: the traced model, for other formats.
    """

    path: Path
    run: Run
    metadata: dict[str, Any]
    difference: float
    program: ExportedProgram


def export_model(
    model: AVSModel,
    cfg: Any,
    format_name: str,
    path: str | Path,
    *,
    size: tuple[int, int] | None = None,
    classes: list[str] | None = None,
    program: ExportedProgram | None = None,
) -> Exported:
    """Export a model; the file is there only if it agrees with the model on numbers of frames unlike the traced one.

    Args:
        model: with its weights.
        cfg: its config.
        format_name: 'pt2' (torch.export), 'onnx' or 'aoti' (AOTInductor).
        path: the file; aoti wants the suffix .pt2.
        size: (height, width) of frames, pixels; None takes that of the config.
        classes: names by class index; None takes those of the config.
        program: the model traced before, from another format's `Exported`.

    Raises:
        ConfigError: an unknown format; a package or a compiler is missing; the format cannot express the model, or the
            file's logits are not the model's (see check_agreement).
        OSError: the file cannot be written.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"format {format_name!r}: {suggestion(format_name, list(FORMATS))}")
    chosen, path = FORMATS[format_name], Path(path)
    if format_name == "aoti" and path.suffix != ".pt2":
        raise ConfigError(f"{path}: a package of AOTInductor has the suffix .pt2.")
    chosen.check()
    model.eval()
    inputs = inputs_of(model, cfg, size)
    _try_eager(model, inputs)
    program = trace(model, inputs) if program is None else program
    metadata = describe(model, cfg, inputs, format_name, classes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        part = Path(folder) / f"model{chosen.suffix}"
        chosen.write(program, part, metadata)
        run, _ = chosen.read(part)
        difference = check_agreement(run, model, inputs, f"the {format_name} file")
        part.replace(path)
    return Exported(path, run, metadata, difference, program)


def inputs_of(model: AVSModel, cfg: Any, size: tuple[int, int] | None = None) -> Inputs:
    """Sizes of a model's inputs; `size` replaces that of the config's frames."""
    height, width = frame_size(cfg) if size is None else size
    if height < 1 or width < 1:
        raise ConfigError(f"frames of {height} x {width} pixels: both must be above 0.")
    shape = front_end(_front_end_name(model)).shape
    coupled = bool(getattr(model.head, "couples_frames", True))
    return Inputs(tuple(shape), (height, width), model.num_frames if coupled else 1)


def describe(
    model: AVSModel, cfg: Any, inputs: Inputs, format_name: str, classes: list[str] | None = None
) -> dict[str, Any]:
    """What a file says of itself: inputs, outputs, how to read them, and the model's config."""
    names = class_names(cfg) if classes is None else classes
    semantic = len(names) > 2
    count = "N" if inputs.multiple == 1 else f"N (whole clips: a multiple of {inputs.multiple})"
    return {
        "format": format_name,
        "task": str(cfg["task"]),
        "inputs": {
            "log_mel": {
                "shape": [count, *inputs.log_mel],
                "dtype": "float32",
                "front_end": _front_end_name(model),
                "meaning": "features of the second of sound around each frame (dataloader/front_ends.py)",
            },
            "frames": {
                "shape": [count, 3, *inputs.size],
                "dtype": "float32",
                "meaning": "RGB in [0, 1], minus mean, divided by std",
                "mean": list(IMAGENET_MEAN),
                "std": list(IMAGENET_STD),
            },
        },
        "outputs": {"logits": {"shape": [count, len(names) if semantic else 1, *inputs.size], "dtype": "float32"}},
        "decision": "class of the largest logit" if semantic else "a pixel sounds where sigmoid(logit) > threshold",
        "threshold": None if semantic else 0.5,
        "classes": list(names),
        "tolerance": TOLERANCE,
        "config": cfg["model"].to_dict() if hasattr(cfg["model"], "to_dict") else dict(cfg["model"]),
    }


@torch.no_grad()
def _try_eager(model: AVSModel, inputs: Inputs) -> None:
    """Run the model once: a size that it does not accept is named by the model itself."""
    try:
        size = tuple(model(*inputs.example(inputs.multiple)).logits.shape[-2:])
    except (RuntimeError, ValueError) as error:
        height, width = inputs.size
        raise ConfigError(f"the model cannot read frames of {height} x {width} pixels ({reason(error)}).") from error
    if size != inputs.size:
        height, width = inputs.size
        raise ConfigError(
            f"frames of {height} x {width} pixels get masks of {size[0]} x {size[1]}: take multiples of 32."
        )


def _front_end_name(model: AVSModel) -> str:
    return str(getattr(model.audio_encoder, "front_end", "vggish"))
