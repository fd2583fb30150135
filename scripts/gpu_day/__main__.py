"""Everything that a GPU can tell about this project, in an hour, in the order of its worth."""

import argparse
import datetime
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from utils.errors import ConfigError
from utils.runtime import ROOT, StopRequested, run

LEAST = 1.0
"""Minutes of the whole; a shorter day would only start things to end them."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="gpu_day.sh", description=__doc__)
    parser.add_argument("--dry", action="store_true", help="every command with small sizes on a CPU, in some minutes")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder; default: work_dir/gpu_day/<date and time>")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the whole; the parts share them (60)")
    parser.add_argument("--parts", nargs="+", metavar="PART", help="only these, in the usual order")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the parts; 0 where all that could run here have succeeded."""
    options = parse()
    if not options.minutes >= LEAST:
        raise ConfigError(f"--minutes {options.minutes:g}: give {LEAST:g} or more.")
    import torch

    from scripts.gpu_day.parts import all_parts
    from scripts.gpu_day.running import adopt_orphans

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0 and not options.dry:
        raise ConfigError("PyTorch finds no GPU here (python -m ops says more): --dry runs the same on a CPU.")
    started = datetime.datetime.now().astimezone()
    out = (options.out or ROOT / "work_dir/gpu_day" / f"{started:%Y-%m-%d_%H-%M-%S}").resolve()
    if (out / "report.json").exists():
        raise ConfigError(f"{out} holds a report already: give another folder with --out.")
    for folder in ("logs", "results"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    parts = all_parts(out, dry=options.dry, gpus=gpus)
    known = [part.name for part in parts]
    if unknown := [name for name in options.parts or () if name not in known]:
        raise ConfigError(f"--parts {unknown[0]}: known are {', '.join(known)}.")
    day = Day(
        [part for part in parts if not options.parts or part.name in options.parts],
        out,
        minutes=options.minutes,
        dry=options.dry,
        started=f"{started:%Y-%m-%d %H:%M:%S %z}",
    )
    os.chdir(ROOT)
    adopt_orphans()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    try:
        day.run()
    except StopRequested as stopped:
        print(f"stopped by signal {stopped.signal_number}; what was done: {out / 'report.md'}", file=sys.stderr)
        return 128 + stopped.signal_number
    print(f"report: {out / 'report.md'}")
    return 0 if all(entry["state"] in ("done", "skipped") for entry in day.entries) else 1


def told(command: Sequence[str]) -> str:
    """A command as it is run from the project's folder, without the names of this machine's folders."""
    words = ["python" if word == sys.executable else word.replace(f"{ROOT}/", "") for word in command]
    return shlex.join(words)


def stop(number: int, frame: FrameType | None) -> None:
    """End the day: what runs is ended, and the report written."""
    raise StopRequested(number, None)


class Day:
    """Runs parts and keeps the report up to date.

    Args:
        parts: in order.
        out: folder of the report.
        minutes: of the whole; a part may take its share of what is left when it starts, so that time that earlier
            parts have left over is shared by the later ones.
        dry: what the report says of the machine.
        started: date and time.
    """

    def __init__(self, parts: list[Any], out: Path, *, minutes: float, dry: bool, started: str) -> None:
        self.parts, self.out, self.seconds = parts, out, 60 * minutes
        self.entries: list[dict[str, Any]] = [
            {
                "name": part.name,
                "title": part.title,
                "state": "waiting",
                "why": "",
                "seconds": None,
                "limit": None,
                "commands": [],
                "summary": None,
            }
            for part in parts
        ]
        self.report: dict[str, Any] = {"started": started, "minutes": minutes, "dry": dry, "state": "under way"}

    def run(self) -> None:
        """All parts; a signal ends the one under way, and the report says so."""
        from scripts.gpu_day.report import machine, write
        from scripts.gpu_day.tables import end_of

        self.report |= {"machine": machine(), "parts": self.entries}
        write(self.out, self.report)
        end = time.monotonic() + self.seconds
        try:
            for index, (part, entry) in enumerate(zip(self.parts, self.entries, strict=True)):
                left = sum(other.share for other in self.parts[index:] if not other.skipped)
                entry["limit"] = None if part.skipped else max(0.0, end - time.monotonic()) * part.share / left
                self._run(part, entry)
                write(self.out, self.report)
            self.report["state"] = "complete"
        except BaseException as error:
            self.report["state"] = f"ended early ({type(error).__name__}: {error})"
            raise
        finally:
            for entry in self.entries:
                if entry["state"] == "running":
                    entry |= {"state": "interrupted", "summary": end_of(self.out / "logs" / f"{entry['name']}.log", 40)}
            write(self.out, self.report)

    def _run(self, part: Any, entry: dict[str, Any]) -> None:
        from scripts.gpu_day.report import write
        from scripts.gpu_day.running import run_limited
        from scripts.gpu_day.tables import end_of, together

        if part.skipped:
            entry |= {"state": "skipped", "why": part.skipped}
            return
        entry["state"] = "running"
        write(self.out, self.report)
        print(f"{part.name}: at most {entry['limit']:.0f} s", flush=True)
        log = self.out / "logs" / f"{part.name}.log"
        begin = time.monotonic()
        for command in part.commands:
            left = entry["limit"] - (time.monotonic() - begin)
            status, took = run_limited(command, log, left, folder=ROOT)
            words = "over its time" if status is None else "ok" if status == 0 else f"status {status}"
            entry["commands"].append({"command": told(command), "end": words, "seconds": took})
            entry["seconds"] = time.monotonic() - begin
            if status is None:
                break
        ends = [given["end"] for given in entry["commands"]]
        wrong = [words for words in ends if words != "ok"]
        entry["state"] = "done" if not wrong else "over its time" if "over its time" in wrong else "failed"
        try:
            entry["summary"] = part.summarise()
        except Exception as error:  # a table that cannot be made must not end the day
            entry["why"] = f"its results cannot be read ({type(error).__name__}: {error})"
        if wrong or entry["summary"] is None:
            entry["summary"] = together(entry["summary"], f"End of logs/{log.name}:", end_of(log, 40))
        print(f"{part.name}: {entry['state']}, {entry['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    run(main)
