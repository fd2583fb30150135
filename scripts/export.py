"""Export a model to files that run without this project.

    python scripts/export.py stamps-62 --format onnx --out stamps.onnx
    python scripts/export.py WEIGHTS --config CONFIG --format pt2 onnx aoti --out model --time

pt2 is PyTorch's torch.export file, onnx is ONNX (opset 20), aoti is machine code for this computer's processor, made by
AOTInductor with a C++ compiler. Each takes log-mels and frames of any number, and gives logits; its metadata says their
shapes and meaning. Each is compared with the model on other numbers of frames before it takes its name.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.errors import ConfigError  # noqa: E402
from utils.runtime import find_file, run  # noqa: E402


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT_OR_NAME",
        help="a packed model by file or name, a model folder, a name on the hub; or weights of --config",
    )
    parser.add_argument("--config", metavar="C", help="config of the weights; default: the one that the model carries")
    parser.add_argument(
        "--format", nargs="+", choices=("pt2", "onnx", "aoti"), default=["pt2"], help="one or more; default: pt2"
    )
    parser.add_argument(
        "--out", metavar="FILE", required=True, type=Path, help="the file; of several formats, its name without suffix"
    )
    parser.add_argument(
        "--size", nargs=2, type=int, metavar=("H", "W"), help="of frames, pixels; default: the config's"
    )
    parser.add_argument(
        "--frames", type=int, metavar="N", help="frames per call that --time measures; default: a clip of the config"
    )
    parser.add_argument("--time", action="store_true", help="print the time per frame of the model and of each file")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Export to each format."""
    given = parse(arguments)
    # Imported only now: --help should not wait for torch.
    from rich.console import Console
    from rich.table import Table

    from scripts.exporting import FORMATS, export_model, inputs_of, time_per_frame

    out = given.out.absolute()
    model, cfg, classes = _load(given.checkpoint, given.config)
    frames = model.num_frames if given.frames is None else given.frames
    size = None if given.size is None else (given.size[0], given.size[1])
    inputs = inputs_of(model, cfg, size)
    if frames < 1 or frames % inputs.multiple:
        raise ConfigError(f"--frames {frames}: this model takes whole clips, multiples of {inputs.multiple} frames.")
    example = inputs.example(frames)
    console = Console(soft_wrap=True, highlight=False)
    table = Table(title=f"time per frame, {frames} frames per call", title_justify="left")
    table.add_column("format")
    table.add_column("ms", justify="right")
    if given.time:
        table.add_row("model", f"{time_per_frame(_logits(model), example):.1f}")
    program = None
    for name in dict.fromkeys(given.format):
        path = out if len(given.format) == 1 else out.with_name(out.name + FORMATS[name].suffix)
        try:
            done = export_model(model, cfg, name, path, size=size, classes=classes, program=program)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written ({error.strerror or error}).") from error
        program = done.program
        console.print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB; "
            f"logits differ from the model's by {done.difference:.1g} at most, {done.metadata['tolerance']} is allowed",
            markup=False,
        )
        if given.time:
            table.add_row(name, f"{time_per_frame(done.run, example):.1f}")
    if given.time:
        console.print(table)
    return 0


def _load(checkpoint: str, config: str | None) -> tuple[Any, Any, list[str] | None]:
    """Model in evaluation mode, config and class names, by the two ways to name a model."""
    from model import build_model
    from model.hub import find_weights, from_pretrained
    from model.packed import load_checkpoint, packed_classes
    from utils.config import check_classes, load_config

    weights = find_weights(checkpoint)
    path = None if config is None else find_file(config, "the config")
    os.chdir(ROOT)  # names of pretrained weights are relative to it
    if path is None:
        model, cfg = from_pretrained(weights)
    else:
        cfg = load_config(path)
        check_classes(cfg)
        model = build_model(cfg.model)
        load_checkpoint(model, cfg.model, weights)
    return model.eval(), cfg, packed_classes(weights)


def _logits(model: Any) -> Any:
    return lambda log_mel, frames: model(log_mel, frames).logits


if __name__ == "__main__":
    run(main)
