"""Check every file of a config's data before training: missing, unreadable, truncated, of the wrong size or colour.

    python scripts/data/check_data.py ms3 config/ms3/MoDAT_pvt2_ms3.py
    python scripts/data/check_data.py avss config/avss/MoDAT_pvt2_avss.py dataset.train.audio=wav --write-clean-csv

Prints one table and one line per fault. Exit code 0: no faults, 1: faults, 2: the command cannot be run.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from dataloader.preflight import Fault, Report, check_data, write_clean_tables  # noqa: E402
from utils.config import TASKS, load_config  # noqa: E402
from utils.errors import UserError  # noqa: E402
from utils.runtime import ensure_data, find_file, tables  # noqa: E402

__all__ = ["Fault", "Report", "check_data", "main"]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("config", metavar="CONFIG", help="config file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys to replace")
    parser.add_argument("--workers", type=int, help="processes (default: process.num_workers of the config)")
    parser.add_argument("--all", action="store_true", help="also check files that passed an earlier check")
    parser.add_argument(
        "--write-clean-csv", action="store_true", help="write NAME.clean.csv beside each table, without the bad clips"
    )
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parse_arguments(arguments)
    try:
        config = find_file(options.config, "the config")
        os.chdir(ROOT)
        cfg = load_config(config, options.overrides, options.task)
        ensure_data(cfg, config)
        report = check_data(cfg, workers=options.workers, remember=not options.all)
        Console().print(report.table())
        for fault in report.faults:
            print(fault)
        if options.write_clean_csv:
            for path, lines in write_clean_tables(report, tables(cfg)).items():
                left_out = ", ".join(str(line) for line in lines) or "none"
                print(f"wrote {path}; lines left out: {left_out}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
