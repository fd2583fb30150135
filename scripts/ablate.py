"""Train, score and compare configs over several seeds: python scripts/ablate.py CONFIG... [--seeds 3] [key=value ...].

Each run is `train.sh`, then `test.sh`, in work_dir/NAME/seedK/CONFIG. After whatever stopped it, the same command goes
on: finished runs are kept, the broken one resumes from its last checkpoint, failed ones are tried again. The table is
in work_dir/NAME: table.md, table.csv, table.tex, and runs.csv with a line per run.

    bash scripts/ablate.sh config/ms3/MoDAT_pvt2_ms3.py config/ablation/MoDAT_pvt2_ms3_no_*.py --name parts
    bash scripts/ablate.sh CONFIG... --slurm --sbatch=--partition=gpu --sbatch=--time=24:00:00
    bash scripts/ablate.sh CONFIG... --name parts --table          # the table of what is finished so far
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.errors import ConfigError  # noqa: E402
from utils.runtime import run  # noqa: E402

WIDTH = 132
"""Of the table where the output is no terminal, characters."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; of the words, those with an equals sign are overrides.

    Raises:
        ConfigError: options that exclude each other.
    """
    parser = argparse.ArgumentParser(
        prog="ablate.sh",
        usage="bash scripts/ablate.sh CONFIG... [options] [key=value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="+", metavar="CONFIG", help="rows of the table; the first one is compared with")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 (default: 3)")
    parser.add_argument("--task", choices=("s4", "ms3", "avss"), help="that the configs must be of")
    parser.add_argument("--name", default="ablate", help="of the study's folder in process.work_dir (default: ablate)")
    parser.add_argument("--gpus", type=int, metavar="N", help="one run on each of N GPUs (default: all GPUs found)")
    parser.add_argument("--slurm", action="store_true", help="submit the runs as a SLURM array, one task per run")
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="=OPTION", help="of sbatch, such as --sbatch=--partition=gpu"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, write the table of what is finished")
    parser.add_argument("--only", type=int, metavar="I", help="the run number I alone, from 0: a task of the array")
    options = parser.parse_intermixed_args(arguments)
    options.overrides = [word for word in options.words if "=" in word]
    options.configs = [word for word in options.words if "=" not in word]
    if not options.configs:
        parser.error("give at least one CONFIG")
    chosen = [name for name in ("slurm", "table") if getattr(options, name)]
    chosen += [name for name in ("gpus", "only") if getattr(options, name) is not None]
    if len(chosen) > 1:
        raise ConfigError(f"--{chosen[0]} and --{chosen[1]} exclude each other.")
    if options.sbatch and not options.slurm:
        raise ConfigError("--sbatch gives options of sbatch, which --slurm submits to: add --slurm.")
    return options


def main() -> int:
    """Run the study; 1 where a run is not scored in the end."""
    options = parse()
    # Imported only now: --help should not wait for torch.
    from rich.console import Console

    from scripts.ablation.execute import find_devices, run_all, unfinished
    from scripts.ablation.slurm import submit
    from scripts.ablation.study import plan, share_caches
    from scripts.ablation.table import terminal, write_table

    console = Console(soft_wrap=True, highlight=False, markup=False)
    study = plan(
        options.configs, seeds=options.seeds, task=options.task, name=options.name, overrides=options.overrides
    )
    os.chdir(ROOT)
    runs = study.runs
    if options.only is not None:
        if not 0 <= options.only < len(runs):
            raise ConfigError(f"--only {options.only}: the study has the runs 0 to {len(runs) - 1}.")
        runs = (runs[options.only],)
    share_caches(study)
    if options.slurm:
        described = [*map(str, study.configs), "--seeds", str(study.seeds), "--name", options.name, *options.overrides]
        console.print(submit(study, described, options.sbatch))
        console.print(f"the table, when tasks have ended: {study.folder / 'table.md'}")
        return 0
    if not options.table:
        devices = [None] if options.only is not None else find_devices(options.gpus)
        run_all(runs, devices, say=console.print, finished=lambda _: write_table(study) and None)
    table, notes = write_table(study)
    Console(width=None if console.is_terminal else WIDTH).print(terminal(table, f"{study.task}, {study.folder.name}"))
    for note in notes:
        console.print(note)
    console.print(f"written: {study.folder}/table.md, table.csv, table.tex, runs.csv")
    return 0 if options.table or not unfinished(runs) else 1


if __name__ == "__main__":
    run(main)
