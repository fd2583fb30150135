"""Make data sets in AVSBench's three layouts from real photographs and recordings.

The material is Debian's package tuxpaint-stamps-default, fetched with apt and unpacked without installing it. Clips
show one to four cut-out photographs over a photographic background; in ms3 and avss those that sound change over the
seconds, next to silent ones of kinds that sound in other clips, so that images alone do not suffice. The split `unseen`
has as many clips as `test`, made of second photographs and recordings of their kinds that occur nowhere else.

    python scripts/data/make_stamps.py                         # s4, ms3 and avss, 600/100/100 clips each, 224 pixels
    python scripts/data/make_stamps.py --tasks ms3 --size 128
    python scripts/data/make_stamps.py --drawn --out /tmp/data # without any download

`sound_labels.json` beside each table holds what sounds and what is visible in each clip, for off-screen sounds
(`test.sh --robust`, `dataset.train.negatives`). Masks of every object, sounding or not, are written next to the true
ones: `s4_data/all_objects` and `ms3_data/all_objects` (as `gt_masks`), and `AVSS/{label}/{uid}/all_objects_rgb`.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from scripts.data.stamps import layouts  # noqa: E402
from scripts.data.stamps.library import (  # noqa: E402
    KINDS,
    MAX_DRAWN_KINDS,
    PACKAGE,
    Library,
    drawn_library,
    fetch_stamps,
    kind_names,
    load_stamps,
    unseen_kinds,
)
from utils import stamps_note  # noqa: E402
from utils.errors import DataError, UserError  # noqa: E402

_CHUNK = 8


@dataclass(frozen=True)
class Settings:
    """Everything that determines the images and sounds; written next to the data as `stamps.json`."""

    clips: tuple[int, int, int]
    size: int
    kinds: int
    seed: int
    drawn: bool


def make_stamps(
    out: Path,
    tasks: Sequence[str],
    settings: Settings,
    *,
    stamps: Path | None = None,
    workers: int | None = None,
    quiet: bool = False,
) -> None:
    """Make the data sets; clips that exist are kept.

    Args:
        out: the data folder.
        tasks: some of 's4', 'ms3', 'avss'.
        settings: what to make.
        stamps: unpacked package; None = fetch it, once, into `out/stamps_source`.
        workers: processes; None = one per core.
        quiet: no progress bar.

    Raises:
        DataError: the folder holds data of other settings, or the material cannot be fetched or read.
    """
    missing = [task for task in tasks if not _finished(out, task, settings)]
    for task in tasks:
        if task not in missing and not layouts.sound_labels(out, task).is_file():
            _label(out, task, settings)
    if not missing:
        return
    if settings.drawn:
        library = drawn_library(settings.kinds, settings.seed)
    else:
        library = load_stamps(stamps or fetch_stamps(out / "stamps_source"), settings.kinds)
    names = kind_names(settings.kinds, drawn=settings.drawn)
    unseen = unseen_kinds(settings.kinds, drawn=settings.drawn)
    context = multiprocessing.get_context("spawn")
    workers = workers or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, context, _start_worker, (library, out, settings)) as pool:
        for task in missing:
            _claim(out, task, settings)
            made = layouts.orders(task, settings.clips, names, settings.seed, unseen)
            _make_all(pool, task, [order for order in made if not layouts.is_made(out, order)], len(made), quiet)
            layouts.write_sound_labels(out, task, made, names, unseen=unseen, seed=settings.seed)
            layouts.write_tables(out, task, made, names)
            _write_note(out, task, settings)  # of this version now, where the data has been extended


def _label(out: Path, task: str, settings: Settings) -> None:
    """Write the sound labels of finished data that was made without them; its clips stay as they are."""
    names = kind_names(settings.kinds, drawn=settings.drawn)
    unseen = unseen_kinds(settings.kinds, drawn=settings.drawn)
    made = layouts.orders(task, settings.clips, names, settings.seed, unseen)
    layouts.write_sound_labels(out, task, made, names, unseen=unseen, seed=settings.seed)


def _make_all(pool: ProcessPoolExecutor, task: str, missing: list[layouts.Order], total: int, quiet: bool) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    chunks = [missing[start : start + _CHUNK] for start in range(0, len(missing), _CHUNK)]
    with Progress(*columns, disable=quiet) as progress:
        bar = progress.add_task(f"{task} clips", total=total, completed=total - len(missing))
        running: set[Future[int]] = {pool.submit(_make_chunk, chunk) for chunk in chunks}
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    progress.advance(bar, future.result())
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_worker: dict[str, Any] = {}


def _start_worker(library: Library, out: Path, settings: Settings) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; a clip in progress is finished
    _worker.update(library=library, out=out, settings=settings)


def _make_chunk(chunk: list[layouts.Order]) -> int:
    settings: Settings = _worker["settings"]
    for order in chunk:
        layouts.make(_worker["out"], order, _worker["library"], size=settings.size, seed=settings.seed)
    return len(chunk)


def _finished(out: Path, task: str, settings: Settings) -> bool:
    return layouts.table(out, task).is_file() and stamps_note.read_note(_folder(out, task)) == _plain(settings)


def _claim(out: Path, task: str, settings: Settings) -> None:
    """Write the settings before the first clip, so that no folder mixes data of two."""
    made = stamps_note.read_note(_folder(out, task))
    if made is None:
        if layouts.table(out, task).exists():
            raise DataError(f"{layouts.table(out, task)} exists and was not made by this script: give another --out.")
        _write_note(out, task, settings)
    elif stamps_note.difference(made, _plain(settings)):
        raise DataError(
            f"{_folder(out, task)} was made with other settings ({json.dumps(made)}): "
            f"give another --out, or remove that folder first."
        )


def _folder(out: Path, task: str) -> Path:
    return out / layouts.FOLDERS[task]


def _write_note(out: Path, task: str, settings: Settings) -> None:
    text = json.dumps(_plain(settings), indent=1)
    layouts.write_atomically(_folder(out, task) / stamps_note.NAME, text.encode())


def _plain(settings: Settings) -> dict[str, Any]:
    return {**vars(settings), "clips": list(settings.clips), "version": stamps_note.VERSION}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data", help="data folder (default: data)")
    parser.add_argument("--tasks", nargs="+", choices=tuple(layouts.FOLDERS), default=list(layouts.FOLDERS))
    parser.add_argument(
        "--clips", nargs=3, type=int, default=(600, 100, 100), metavar=("TRAIN", "VAL", "TEST"), help="clips per task"
    )
    parser.add_argument("--size", type=int, default=224, help="height and width in pixels (default: 224)")
    parser.add_argument("--kinds", type=int, help=f"kinds of objects (default: all, {len(KINDS)})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--stamps", type=Path, help=f"unpacked files of {PACKAGE}, instead of fetching them")
    source.add_argument("--drawn", action="store_true", help="drawn shapes and synthesised sounds, no download")
    options = parser.parse_args(arguments)
    if options.kinds is None:
        options.kinds = MAX_DRAWN_KINDS if options.drawn else len(KINDS)
    if min(options.clips) < 1 or options.size < 32 or options.kinds < 2 or (options.workers or 1) < 1:
        parser.error("--clips and --workers must be at least 1, --size at least 32, --kinds at least 2")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parse_arguments(arguments)
    settings = Settings(tuple(options.clips), options.size, options.kinds, options.seed, options.drawn)
    try:
        make_stamps(options.out, options.tasks, settings, stamps=options.stamps, workers=options.workers)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the finished clips are kept, and the same command continues from them", file=sys.stderr)
        return 130
    for task in options.tasks:
        print(f"{task}: {layouts.table(options.out, task)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
