"""Compare runs on one HTML page: configs, scores, curves, and the same clips side by side.

    python scripts/report.py work_dir/MoDAT_lite0_ms3_stamps [RUN ...] [--out report.html]

Reads what training and test.sh leave in a run's folder; runs without a test are shown without clips. The page is one
file without scripts, and loads nothing from elsewhere.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from utils.errors import UserError  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    """Write the page; returns the exit status, 0 or 2 (an error of the user)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, such as work_dir/MoDAT_pvt2_ms3")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page; default: report.html")
    parser.add_argument(
        "--split", default="test", help="test whose clips are shown: test (default), val, unseen, test_silence ..."
    )
    parser.add_argument("--clips", type=int, default=12, help="clips shown; default: 12")
    options = parser.parse_args(arguments)
    from scripts.reporting.page import MAX_RUNS, page
    from scripts.reporting.runs import read_runs
    from utils.files import atomic_path

    if len(options.runs) > MAX_RUNS:
        parser.error(f"{len(options.runs)} runs: colours and markers tell at most {MAX_RUNS} apart")
    if options.clips < 0:
        parser.error(f"--clips {options.clips}: give 0 or more")
    try:
        text = page(read_runs(options.runs), split=options.split, clips=options.clips)
        with atomic_path(options.out, durable=False) as part:
            part.write_text(text, encoding="utf-8")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {options.out} cannot be written ({error.strerror or error}).", file=sys.stderr)
        return 2
    print(f"written: {options.out} ({options.out.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
