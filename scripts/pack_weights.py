"""Pack a run's best weights with its config and scores: the pretrained parts that stayed frozen are left out.

    python scripts/pack_weights.py CONFIG CHECKPOINT TARGET.safetensors [key=value ...]
    python scripts/pack_weights.py CONFIG CHECKPOINT FOLDER [--whole]       # a model folder, see model/hub.py

Scores are those that test.sh wrote into the run's folder. `bash test.sh TASK CONFIG TARGET.safetensors` reads the file;
a file in model/packed/ is found by its name alone.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.errors import UserError  # noqa: E402
from utils.runtime import find_file  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Pack one file; returns the exit status, 0 or 2 (an error of the user)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="of the run")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="the run's weights")
    parser.add_argument("target", type=Path, metavar="TARGET", help="the .safetensors file, or folder, to write")
    parser.add_argument("--whole", action="store_true", help="keep the pretrained parts inside")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys that the run replaced")
    options = parser.parse_intermixed_args(arguments)
    from model import build_model
    from model.checkpoint import load_weights, read_record
    from model.hub import WEIGHTS, save_pretrained
    from model.packed import pack
    from utils.config import load_config

    try:
        config = find_file(options.config, "the config")
        checkpoint = find_file(options.checkpoint, "the checkpoint")
        target = options.target.absolute()
        os.chdir(ROOT)
        cfg = load_config(config, options.overrides)
        model = build_model(cfg.model)
        load_weights(model, checkpoint)
        files = sorted(checkpoint.parent.glob("*_metrics.json"))
        scores = {file.stem.removesuffix("_metrics"): json.loads(file.read_text()) for file in files}
        plain = {name: _plain(found) for name, found in scores.items()}
        extra: dict[str, Any] = {"classes": _classes(cfg), "whole": options.whole, "record": read_record(checkpoint)}
        if target.suffix:
            left_out = pack(model, cfg, target, plain, **extra)
        else:
            left_out = save_pretrained(model, cfg, target, scores=plain, **extra)
            target /= WEIGHTS
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.target} cannot be written ({error.strerror or error}).", file=sys.stderr)
        return 2
    print(
        f"{target}: {target.stat().st_size / 1e6:.1f} MB, scores of {', '.join(scores) or 'no split'}; left out: ",
        end="",
    )
    print(", ".join(f"{part} ({cfg.model[part]['weights']})" for part in left_out) or "nothing")
    return 0


def _classes(cfg: Any) -> list[str] | None:
    """Class names from the table that the config names; None where it names none, or the table is missing."""
    from dataloader.semantic import read_classes

    table = cfg.dataset["test"].get("label_idx_path")
    return read_classes(table, cfg.model["head"]["num_classes"]) if table and Path(table).is_file() else None


def _plain(found: dict[str, object]) -> dict[str, object]:
    """The numbers of a result file, without paths and per-class tables."""
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    sys.exit(main())
