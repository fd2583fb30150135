"""Train a model: python train.py TASK CONFIG [key=value ...]."""

import argparse
import os
import sys
from pathlib import Path

from utils.errors import ConfigError
from utils.runtime import ROOT, ensure_data, find_file, run, shipped_configs


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train a model. The run's folder is process.work_dir/<config name>.",
        epilog="shipped configs:\n  " + "\n  ".join(shipped_configs()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=("s4", "ms3", "avss"), help="must be the config's")
    parser.add_argument("config", help="a Python config; relative paths inside it are from the project's folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example process.train_epochs=3")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="delete the run in the folder, and start anew")
    parser.add_argument(
        "--init-from", metavar="CHECKPOINT", help="start from the weights of another run, as far as they fit"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="try the config and this machine in two minutes: two steps, validation, resume and test on drawn data",
    )
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Check the request, make the stamps data if the config needs them, train."""
    options = parse()
    config = find_file(options.config, "the config")
    # Fabric starts the processes of further GPUs with these arguments, from the folder that is entered now.
    found = {options.config: str(config)}
    if options.init_from is not None:
        init_from = str(find_file(options.init_from, "the checkpoint of --init-from"))
        found |= {options.init_from: init_from, f"--init-from={options.init_from}": f"--init-from={init_from}"}
        options.init_from = init_from
    sys.argv = [str(Path(__file__).resolve()), *(found.get(x, x) for x in sys.argv[1:])]
    os.chdir(ROOT)
    # Imported only now: --help and a mistyped path should not wait for torch.
    from scripts.engine.folder import check_choice
    from scripts.engine.run import train
    from utils.config import load_config

    cfg = load_config(config, options.overrides, options.task)
    check_choice(resume=options.resume, overwrite=options.overwrite, init_from=options.init_from)
    if options.smoke:
        if options.resume or options.overwrite or options.init_from:
            raise ConfigError("--smoke writes into a folder of its own: leave --resume, --overwrite, --init-from out.")
        from scripts.engine.smoke import smoke

        return smoke(cfg, config)
    ensure_data(cfg, config)
    train(cfg, config.stem, resume=options.resume, overwrite=options.overwrite, init_from=options.init_from)
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run(main)
