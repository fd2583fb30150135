"""Score weights: python test.py TASK CONFIG CHECKPOINT [options] [key=value ...]."""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from utils.runtime import ROOT, ensure_data, find_checkpoint, find_file, run, shipped_configs

SPLITS = ("train", "val", "test", "unseen")
TRAINING_KEYS = ("negatives", "augment")
SOUNDS = ("real", "silence", "noise", "shuffled")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line; of the last words, those with an equals sign are overrides."""
    parser = argparse.ArgumentParser(
        prog="test.py",
        usage="%(prog)s [options] TASK CONFIG CHECKPOINT [key=value ...]",
        description="Score weights on a split; results go to process.work_dir/<config name>.",
        epilog="shipped configs:\n  " + "\n  ".join(shipped_configs()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "task", metavar="TASK", choices=("s4", "ms3", "avss"), help="s4, ms3 or avss; must fit the config"
    )
    parser.add_argument(
        "config", metavar="CONFIG", help="a Python config; relative paths inside it are from the project"
    )
    parser.add_argument(
        "rest", nargs="*", metavar="CHECKPOINT [key=value ...]", help="weights, published or ours; config overrides"
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="test",
        help="default: test; unseen: stamps of photographs and recordings outside the other splits",
    )
    parser.add_argument(
        "--audio", choices=SOUNDS, default="real", help="the clips' own sound (default), or what replaces it"
    )
    parser.add_argument(
        "--robust",
        action="store_true",
        help="score with the clips' own sound, silence, noise and off-screen sounds, and how much is painted on each",
    )
    parser.add_argument("--save-masks", action="store_true", help="write the predicted masks in AVSBench's form")
    parser.add_argument(
        "--oracle", action="store_true", help="score, instead of weights, the masks of all objects, sounding or not"
    )
    parser.add_argument(
        "--explain", action="store_true", help="also draw which pixels go to which expert, and the queries' attention"
    )
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [word for word in options.rest if "=" in word]
    checkpoints = [word for word in options.rest if "=" not in word]
    if len(checkpoints) != (0 if options.oracle else 1):
        parser.error("give one CHECKPOINT" if not options.oracle else "--oracle scores no CHECKPOINT: leave it out")
    if options.oracle and options.audio != "real":
        parser.error("--oracle uses no sound: leave --audio out")
    if options.explain and (options.oracle or options.robust or options.audio != "real"):
        parser.error("--explain looks into the model on the clips' own sound: leave --oracle, --robust and --audio out")
    if options.robust and (options.oracle or options.save_masks or options.audio != "real"):
        parser.error("--robust chooses the sounds and writes scores: leave --oracle, --audio and --save-masks out")
    options.checkpoint = checkpoints[0] if checkpoints else None
    return options


def main() -> int:
    """Build the predictor, score it, write the results."""
    options = parse()
    config = find_file(options.config, "the config")
    checkpoint = find_checkpoint(options.checkpoint) if options.checkpoint else None
    os.chdir(ROOT)
    # Imported only now: --help and a mistyped path should not wait for torch.
    from rich.console import Console

    from dataloader import build_dataset
    from dataloader.audio_ablation import ReplacedSound
    from scripts.engine.explain import explain
    from scripts.engine.testing import (
        EverythingOracle,
        origin_of_scores,
        results_table,
        score,
        write_results,
    )
    from scripts.engine.trackers import show_in_tensorboard
    from utils.config import load_config
    from utils.files import explain_write_error

    cfg = load_config(config, options.overrides, options.task)
    ensure_data(cfg, config, extend=options.split == "unseen")
    folder = Path(cfg.process.work_dir) / config.stem
    split_cfg, where = split_config(cfg, options.split)
    dataset = build_dataset(split_cfg, where=where)
    predictor: Any = (
        EverythingOracle(split_cfg, where)
        if checkpoint is None
        else load_predictor(cfg, checkpoint, hooks=options.explain)
    )
    now = origin_of_scores(dataset, options.split, checkpoint)
    kind = "oracle" if checkpoint is None else options.audio
    title = options.split if kind == "real" else f"{options.split}_{kind}"
    if options.robust:
        return robust(cfg, config, checkpoint, options.split, dataset, predictor, now)
    try:
        scores = score(
            predictor,
            dataset,
            task=cfg.task,
            folder=folder,
            title=title,
            items=None if options.audio == "real" else ReplacedSound(dataset, options.audio, cfg.process.seed),
            masks_folder=folder / "masks" / title if options.save_masks else None,
            workers=cfg.process.num_workers,
            console=Console(),
        )
        header: dict[str, Any] = {
            "task": cfg.task,
            "config": str(config),
            "checkpoint": str(checkpoint) if checkpoint else None,
            "split": options.split,
            "audio": kind,
            "clips": len(dataset),
            "origin": now,
        }
        target = folder / f"{title}_metrics.json"
        write_results(target, header, scores)
        pictures = explain(predictor, dataset, folder, title) if options.explain else []
        show_in_tensorboard(folder, title)
    except OSError as error:
        explained = explain_write_error(error, folder)
        if explained is None:
            raise
        raise explained from error
    Console().print(results_table(scores, f"{cfg.task}, {options.split} ({len(dataset)} clips), {kind}"))
    print(f"written: {target}, {folder / 'images' / title}.png")
    for picture in pictures:
        print(f"written: {picture}")
    if options.save_masks:
        print(f"masks: {folder / 'masks' / title}")
    return 0


def robust(
    cfg: Any, config: Path, checkpoint: Path | None, split: str, dataset: Any, predictor: Any, origin: Any
) -> int:
    """Score the split with four sounds, write the results."""
    from rich.console import Console

    from scripts.engine.robust import robust_table, score_robust
    from scripts.engine.testing import write_results
    from utils.files import explain_write_error

    folder, title = Path(cfg.process.work_dir) / config.stem, f"{split}_robust"
    console = Console()
    try:
        scores = score_robust(
            predictor,
            dataset,
            task=cfg.task,
            folder=folder,
            title=title,
            seed=cfg.process.seed,
            workers=cfg.process.num_workers,
            console=console,
        )
        header: dict[str, Any] = {
            "task": cfg.task,
            "config": str(config),
            "checkpoint": str(checkpoint),
            "split": split,
        }
        target = folder / f"{title}.json"
        header |= {"seed": cfg.process.seed, "clips": len(dataset), "origin": origin}
        write_results(target, header, scores)
    except OSError as error:
        explained = explain_write_error(error, folder)
        if explained is None:
            raise
        raise explained from error
    console.print(robust_table(scores, f"{cfg.task}, {split} ({len(dataset)} clips)"))
    print(f"written: {target}, {folder / 'images' / title}.png")
    return 0


def split_config(cfg: Any, split: str) -> tuple[Any, str]:
    """The data set of a split and its name in the config; `unseen` is read as `test` is, from the same table.

    Clips of the train split are scored as they are, without negatives and augmentation.
    """
    if split == "unseen" and split not in cfg.dataset:
        return {**cfg.dataset["test"], "split": split}, "dataset.test"
    return {key: value for key, value in cfg.dataset[split].items() if key not in TRAINING_KEYS}, f"dataset.{split}"


def load_predictor(cfg: Any, checkpoint: Path, *, hooks: bool = False) -> Any:
    """The config's model with the weights of a file; `hooks`: left as it is, since compiled models call none."""
    import torch

    from model import build_model
    from model.packed import load_checkpoint
    from model.precision import check_precision
    from scripts.engine.testing import ModelPredictor
    from utils.config import check_classes
    from utils.cpu import resolve_precision
    from utils.reproducibility import configure_torch, seed_everything
    from utils.runtime import warn

    configure_torch(cfg.process)
    seed_everything(cfg.process.seed)
    check_classes(cfg)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = resolve_precision(cfg.process.precision, device, warn)
    check_precision(precision, device.type)
    model = build_model(cfg.model)
    load_checkpoint(model, cfg.model, checkpoint)
    if cfg.process.compile and not hooks:
        model.compile(mode=None if cfg.process.compile is True else cfg.process.compile)
    return ModelPredictor(model, precision, device)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run(main)
