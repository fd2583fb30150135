"""From what AVSBench hands out to what training reads.

    python scripts/data/prepare_avsbench.py ~/AVSBench --out data                   # every task that is found
    python scripts/data/prepare_avsbench.py ~/AVSBench --out data --task avss --size 384
    python scripts/data/prepare_avsbench.py ~/AVSBench --out data --dry-run         # what is there, and the disk space

Reads Single-source and Multi-sources, and AVSBench-semantic (v1s, v1m, v2), which also serves s4 and ms3; clips without
extracted frames or waves are taken from their videos. Writes frames and masks of one size, the waves as they are and
VGGish's log-mels in the layouts of config/_base_/datasets/, then checks what training reads. Inputs and outputs as
trees: dataloader/README.md. The originals are only read.

Every audio encoder hears what it hears of the originals. --sample-rate makes small mono waves instead, for VGGish
alone at 16000; aiSFX hears up to 22 kHz, and needs 44100 or more.

Killed or stopped, the same command continues; finished clips are kept. Broken clips are listed all at once and left out
of the table; the others are prepared. Exit code 0: all clips, 1: some are broken, 2: the command cannot be run.
"""

import argparse
import csv
import fcntl
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402

from dataloader.preflight import SPLITS, Fault, check_data  # noqa: E402
from scripts.data.avsbench import release as releases  # noqa: E402
from scripts.data.avsbench.convert import (  # noqa: E402
    SHORTER,
    STRETCH,
    Settings,
    bytes_needed,
    convert,
    free_bytes,
    is_made,
    limit_threads,
)
from scripts.data.avsbench.release import FOLDERS, Release, SourceClip, find_releases, list_clips  # noqa: E402
from utils.errors import DataError, UserError  # noqa: E402
from utils.files import atomic_path  # noqa: E402

NOTE = "prepared.json"
FAULTS = "faults.txt"
_CHUNK = 8
_RESERVE = 256 * 2**20  # bytes of the disk that stay free


@dataclass
class Prepared:
    """What was done for a task.

    Attributes:
        table: of the prepared clips.
        clips: in the table.
        kept: of these, those that an earlier run had finished.
        faults: of the clips that were left out, and those that the check found.
        skipped: lines of the source's table with a label other than v1s, v1m and v2.
    """

    table: Path
    clips: int = 0
    kept: int = 0
    faults: list[Fault] = field(default_factory=list)
    skipped: int = 0


def prepare(
    release: Release, out: Path, settings: Settings, *, jobs: int, s4_table: Path | None = None, quiet: bool = False
) -> Prepared:
    """Prepare one task's clips, write its table and check it; clips that an earlier run finished are kept.

    Args:
        release: from `find_releases`.
        out: the data folder.
        settings: of the prepared files.
        jobs: processes; 1 works in this one.
        s4_table: categories of v1s, see `list_clips`.
        quiet: no progress bars.

    Raises:
        DataError: the source's table is broken, or the folder holds other data.
        CannotWriteError: the disk is full or read-only.
    """
    listing = list_clips(release, out, s4_table)
    root = out / FOLDERS[release.task]
    _claim(root, release, settings)
    missing = [clip for clip in listing.clips if not is_made(clip, settings)]
    result = Prepared(root / releases.TABLES[release.task], kept=len(listing.clips) - len(missing))
    result.skipped = listing.skipped
    if missing:
        _remove_parts(root)
    found = _convert_all(missing, len(listing.clips), settings, jobs, f"{release.task} clips", quiet)
    result.faults = [*listing.faults, *found]
    bad = {fault.clip for fault in found}
    good = [clip for clip in listing.clips if clip.name not in bad]
    if good:
        if release.task == "avss":
            _write(root / releases.CLASS_LIST, (release.data / releases.CLASS_LIST).read_bytes())
        _write_table(result.table, listing.columns, good)
        cfg = dataset_config(release.task, out, settings, {clip.split for clip in good})
        damaged = check_data(cfg, workers=jobs if jobs > 1 else 0, progress=not quiet).faults
        result.faults += damaged
        if damaged:
            good = _leave_out(damaged, good)
            _write_table(result.table, listing.columns, good)
    result.clips = len(good)
    _write_faults(root / FAULTS, result.faults)
    return result


def _leave_out(damaged: Sequence[Fault], clips: Sequence[SourceClip]) -> list[SourceClip]:
    """The clips without those whose prepared files are damaged, by a power cut perhaps; these count as not made."""
    names = {fault.clip for fault in damaged}
    for clip in clips:
        if clip.name in names:
            clip.made.log_mel.unlink(missing_ok=True)
    return [clip for clip in clips if clip.name not in names]


def dataset_config(task: str, out: Path, settings: Settings, splits: set[str]) -> dict[str, Any]:
    """A config whose data sets read the prepared clips; `dataset` is that of config/_base_/datasets/ with other paths.

    Args:
        task: 's4', 'ms3' or 'avss'.
        out: the data folder.
        settings: of the prepared files.
        splits: that have clips.
    """
    root = out / FOLDERS[task]
    size = settings.size or 224
    common: dict[str, Any] = {"img_size": (size, size), "batch_size": 2}
    if task == "avss":
        common |= {
            "type": "AVSSDataset",
            "meta_csv_path": str(root / releases.TABLES[task]),
            "label_idx_path": str(root / releases.CLASS_LIST),
            "dir_base": str(root),
            "crop_img_and_mask": False,
        }
    else:
        data = root / f"{task}_data"
        common |= {
            "type": {"s4": "S4Dataset", "ms3": "MS3Dataset"}[task],
            "anno_csv": str(root / releases.TABLES[task]),
            "dir_img": str(data / "visual_frames"),
            "dir_audio_log_mel": str(data / "audio_log_mel"),
            "dir_mask": str(data / "gt_masks"),
        }
    dataset = {split: {**common, "split": split} for split in SPLITS if split in splits}
    return {"task": task, "dataset": dataset, "process": {"num_workers": 0}}


def refuse_overlap(source: Path, out: Path, tasks: Sequence[str]) -> None:
    """Check that nothing would be written where the originals are.

    Raises:
        DataError: `out` is within the source, or a folder that is written holds the source or is within it.
    """
    original = source.resolve()
    if out.resolve().is_relative_to(original):
        raise DataError(f"--out {out} is inside {source}, whose files stay as they are: give a folder outside it.")
    for task in tasks:
        written = (out / FOLDERS[task]).resolve()
        if written.is_relative_to(original) or original.is_relative_to(written):
            raise DataError(
                f"{out / FOLDERS[task]} would be written, and it is where the originals in {source} are: give another "
                "--out."
            )


def _claim(root: Path, release: Release, settings: Settings) -> None:
    """Write the settings before the first clip, so that no folder mixes data of two."""
    note = root / NOTE
    wanted = {
        "size": settings.size,
        "fit": settings.fit,
        "sample_rate": settings.sample_rate,
        "release": release.kind,
    }
    try:
        made = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if root.is_dir() and any(not path.name.endswith(".part") for path in root.iterdir()):
            raise DataError(f"{root} is not empty and was not made by this command: give another --out.") from None
        _write(note, json.dumps(wanted, indent=1).encode())
        return
    except (OSError, ValueError) as error:
        raise DataError(f"{note} cannot be read ({error}): remove {root}.") from error
    for key, value in wanted.items():
        if not isinstance(made, dict) or made.get(key) != value:
            before = made.get(key) if isinstance(made, dict) else None
            raise DataError(
                f"{root} was made with {key}={before}, and now {key}={value}: give the options of then or another "
                "--out, or remove it."
            )


def _remove_parts(root: Path) -> None:
    """Remove what a killed run had not finished writing."""
    for folder, _, names in os.walk(root):
        for name in names:
            if name.startswith(".") and name.endswith(".part"):
                Path(folder, name).unlink(missing_ok=True)


def _convert_all(
    clips: list[SourceClip], total: int, settings: Settings, jobs: int, title: str, quiet: bool
) -> list[Fault]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=quiet) as progress:
        bar = progress.add_task(title, total=total, completed=total - len(clips))
        if jobs == 1:
            faults = []
            for clip in clips:
                faults += convert(clip, settings)
                progress.advance(bar)
            return faults
        found: dict[int, list[Fault]] = {}
        for start, chunk in _in_processes(clips, settings, jobs):
            found[start] = [fault for faults in chunk for fault in faults]
            progress.advance(bar, len(chunk))
        return [fault for start in sorted(found) for fault in found[start]]


def _in_processes(clips: list[SourceClip], settings: Settings, jobs: int) -> Iterator[tuple[int, list[list[Fault]]]]:
    """(position of the first clip, faults of each clip) of chunks, as they are finished."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, _start_worker) as pool:
        starts = range(0, len(clips), _CHUNK)
        work = {pool.submit(_convert_chunk, clips[start : start + _CHUNK], settings): start for start in starts}
        running: set[Future[list[list[Fault]]]] = set(work)
        try:
            while running:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield work[future], future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a process was killed, by lack of memory perhaps; the finished clips are kept: run the same command "
                "again, with fewer --jobs."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _convert_chunk(clips: list[SourceClip], settings: Settings) -> list[list[Fault]]:
    return [convert(clip, settings) for clip in clips]


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C; chunks in progress are finished
    limit_threads()
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process when its parent was killed, so that none goes on writing."""
    wait_for([parent])
    os._exit(1)


def _write_table(path: Path, columns: Sequence[str], clips: Sequence[SourceClip]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([clip.cells.get(column, "") for column in columns] for clip in clips)
    _write(path, text.getvalue().encode())


def _write_faults(path: Path, faults: Sequence[Fault]) -> None:
    if faults:
        _write(path, "".join(f"{fault}\n" for fault in faults).encode())
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    with atomic_path(path) as part:
        part.write_bytes(data)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Refuse to run beside another command that writes the same folder."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".prepare_avsbench.lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"another prepare_avsbench.py is writing {out}: wait for it.") from error
        yield


def _tell_space(found: dict[str, Release], options: argparse.Namespace, settings: Settings) -> None:
    """Print what is there and the space it needs.

    Raises:
        DataError: it does not fit.
    """
    needed = 0
    for task, release in found.items():
        try:
            clips = list_clips(release, options.out, options.s4_table).clips
        except DataError:
            continue  # reported when the task is prepared
        missing = [clip for clip in clips if not is_made(clip, settings)]
        space = sum(bytes_needed(clip, settings) for clip in missing)
        needed += space
        what = "v1s, v1m, v2" if task == "avss" else releases.SUBSET_OF[task]
        source = f"{what} of {release.data}" if release.kind == releases.SEMANTIC else str(release.data)
        print(f"{task}: {len(clips)} clips in {source}, {len(missing)} to prepare, about {_size(space)}")
    free = free_bytes(options.out)
    print(f"{options.out}: about {_size(needed)} needed, {_size(free)} free", flush=True)
    if needed + _RESERVE > free:
        raise DataError(
            f"{options.out} has {_size(free)} free, and about {_size(needed)} are needed: make room, give an --out on "
            "another disk, a smaller --size, or one --task."
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder that AVSBench was unpacked to")
    parser.add_argument("--out", type=Path, required=True, help="data folder; `data` is where the configs look")
    parser.add_argument("--task", choices=releases.TASKS, action="append", help="may be repeated (default: all found)")
    parser.add_argument(
        "--release",
        choices=(releases.OBJECT, releases.SEMANTIC),
        help="for s4 and ms3: Single-source and Multi-sources, or v1s and v1m (default: the former where both are)",
    )
    parser.add_argument("--size", default="224", help="pixels (default: 224), or 'original'")
    parser.add_argument(
        "--fit",
        choices=(STRETCH, SHORTER),
        default=STRETCH,
        help="stretch to SIZE x SIZE (default), or make the shorter side SIZE (for crop_img_and_mask=True)",
    )
    parser.add_argument(
        "--sample-rate",
        type=int,
        metavar="HZ",
        help="mono waves of this rate; what lies above half of it is lost to encoders that hear more (default: waves "
        "are copied, and sounds of videos keep their rate)",
    )
    parser.add_argument("--pkl", action="store_true", help="also write log-mels as AVSBench's .pkl, for other code")
    parser.add_argument(
        "--s4-table", type=Path, metavar="CSV", help="s4_meta_data.csv with the categories of v1s (default: a_obj)"
    )
    parser.add_argument("--jobs", type=int, help="processes (default: one per core)")
    parser.add_argument("--dry-run", action="store_true", help="say what is there and the disk space, write nothing")
    options = parser.parse_args(arguments)
    if options.size != "original" and not (options.size.isdecimal() and 16 <= int(options.size) <= 4096):
        parser.error(f"--size {options.size}: give 16 to 4096 pixels, or 'original'")
    options.jobs = len(os.sched_getaffinity(0)) if options.jobs is None else options.jobs
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: give 1 or more processes")
    if options.sample_rate is not None and not 8000 <= options.sample_rate <= 192_000:
        parser.error(f"--sample-rate {options.sample_rate}: give 8000 to 192000 Hz, or leave it out to keep the waves")
    return options


def run(options: argparse.Namespace) -> int:
    """Prepare the tasks of a command line; returns the exit code.

    Raises:
        UserError: nothing can be prepared.
    """
    size = None if options.size == "original" else int(options.size)
    settings = Settings(size, options.fit, options.sample_rate, options.pkl)
    found = find_releases(options.source, options.release)
    wanted = options.task or list(found)
    if lacking := [task for task in wanted if task not in found]:
        raise DataError(f"{options.source} has no data of {', '.join(lacking)}; it has {', '.join(found)}.")
    found = {task: found[task] for task in releases.TASKS if task in wanted}
    if options.s4_table is None and "s4" in found and found["s4"].kind == releases.SEMANTIC:
        other = find_releases(options.source).get("s4")
        options.s4_table = other.table if other is not None and other.kind == releases.OBJECT else None
    refuse_overlap(options.source, options.out, list(found))
    _tell_space(found, options, settings)
    if options.dry_run:
        return 0
    status = 0
    with _alone(options.out):
        for task, release in found.items():
            try:
                done = prepare(release, options.out, settings, jobs=options.jobs, s4_table=options.s4_table)
            except DataError as error:
                print(f"error: {task}: {error}", file=sys.stderr)
                status = 2
                continue
            for fault in done.faults:
                print(f"{task} {fault}")
            status = max(status, int(bool(done.faults)))
            _tell_result(task, done)
    return status


def _tell_result(task: str, done: Prepared) -> None:
    bad = len({fault.clip for fault in done.faults})
    kept = f" ({done.kept} from an earlier run)" if done.kept else ""
    left_out = f"; {bad} broken, listed in {done.table.parent / FAULTS}" if done.faults else "; no faults"
    skipped = f"; {done.skipped} lines with other labels skipped" if done.skipped else ""
    print(f"{task}: {done.clips} clips prepared{kept} and checked{left_out}{skipped}. {done.table}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = parse_arguments(arguments)
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename} cannot be written ({error.strerror}).", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the finished clips are kept, and the same command continues from them", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
