"""Runs of a study: one after another, or one per GPU. What is finished is kept, what is broken off goes on."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import FrameType, TracebackType

from scripts.ablation.study import (
    CLIPS,
    LOG,
    SCORES,
    Run,
    State,
    begin_attempt,
    close_attempt,
    is_scored,
    read_state,
    working,
    write_state,
)
from utils.errors import ConfigError
from utils.files import LAST
from utils.runtime import ROOT, StopRequested

POLL_SECONDS = 0.2
EXCEPTION = re.compile(r"(\[rank\d+\]: )?[\w.]+(Error|Exception|Interrupt|Exit)\b")
"""Beginning of the last line of a traceback, also as torch.distributed prints it."""
Device = str | None
"""CUDA_VISIBLE_DEVICES of a run; None leaves it as it is."""


def find_devices(gpus: int | None) -> list[Device]:
    """What runs are distributed over: GPUs, or this machine as it is where it has one or none.

    Args:
        gpus: how many to use; None for all.

    Raises:
        ConfigError: there are fewer.
    """
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = torch.cuda.device_count()
    names = visible.split(",") if visible else [str(index) for index in range(found)]
    if gpus is None:
        return [None] if found < 2 else list(names[:found])
    if not 1 <= gpus <= found:
        raise ConfigError(
            f"--gpus {gpus}: this machine has {found} GPU{'' if found == 1 else 's'} that PyTorch can use; give 1 to "
            "their number, or leave --gpus out."
        )
    return list(names[:gpus])


def run_all(
    runs: Sequence[Run],
    devices: Sequence[Device],
    *,
    say: Callable[[str], None],
    finished: Callable[[Run], None],
    project: Path = ROOT,
) -> None:
    """Train and score runs; the failure of one stops no other.

    Args:
        runs: in order.
        devices: at most one run is at work on each.
        say: told what begins and ends.
        finished: called after each run, scored or failed.
        project: holds train.sh and test.sh.

    Raises:
        StopRequested: SIGTERM or Ctrl-C; the runs at work have saved their state.
    """
    waiting = deque(run for run in runs if not is_scored(run))
    kept = len(runs) - len(waiting)
    if kept:
        say(f"{kept} of {len(runs)} runs are finished and kept")
    total, free, busy = len(waiting), list(devices), set[str]()
    with _Jobs() as jobs:
        while waiting or jobs.active:
            for _ in range(len(waiting)):
                if not free:
                    break
                run = waiting.popleft()
                job = Job(run, free[0], project, len(devices))
                if not job.take():
                    if run.name not in busy:
                        busy.add(run.name)
                        say(f"{run.name}: another process works on it, and is waited for")
                    waiting.append(run)
                    continue
                if job.begin():
                    free.pop(0)
                    jobs.active.append(job)
                    where = f", GPU {job.device}" if job.device is not None else ""
                    say(f"[{total - len(waiting)}/{total}] {run.name}: {job.phase}{where}; log: {run.folder / LOG}")
                else:
                    job.release()
                    _tell(job, say)
                    finished(run)
            for job in [job for job in jobs.active if job.ended()]:
                jobs.active.remove(job)
                free.append(job.device)
                job.release()
                _tell(job, say)
                finished(job.run)
            if jobs.active or waiting:
                time.sleep(POLL_SECONDS)


def _tell(job: "Job", say: Callable[[str], None]) -> None:
    say(f"{job.run.name}: {job.state.error or f'scored, {job.state.minutes:.1f} minutes of training'}")


class Job:
    """A run at work.

    Args:
        run: what is run.
        device: where.
        project: holds train.sh and test.sh.
        neighbours: runs that share the machine's CPUs.
    """

    def __init__(self, run: Run, device: Device, project: Path, neighbours: int = 1) -> None:
        self.run, self.device, self.project, self.neighbours = run, device, project, neighbours
        self.phase = ""
        self.state = State(run.digest)
        self.process: subprocess.Popen[bytes] | None = None
        self._held = contextlib.ExitStack()
        self._lock: int | None = None
        self._log_begin = 0

    def take(self) -> bool:
        """Hold the run; False where another process does."""
        self._lock = self._held.enter_context(working(self.run))
        if self._lock is None:
            self.release()
        return self._lock is not None

    def release(self) -> None:
        """Let go of the run."""
        self._held.close()

    def begin(self) -> bool:
        """Start what is left to do; False where nothing can be started, and `state.error` says why."""
        try:
            state = read_state(self.run)
        except ConfigError as error:
            self.state.error = str(error)
            return False
        foreign = state is None and (self.run.folder / LAST).exists()
        if foreign or (state is not None and state.digest != self.run.digest):
            self.state.error = (
                f"{self.run.folder} holds a run of another config or other options: name another study with --name, "
                "or remove that folder."
            )
            return False
        self.state = state or self.state
        self.state.error = ""
        if is_scored(self.run):  # by the process that was waited for
            return False
        self._start("testing" if self.state.trained else "training")
        return True

    def ended(self) -> bool:
        """Whether the run has been scored or has failed; starts the test after training."""
        status = self.process.poll() if self.process else None
        if status is None:
            return False
        if self.phase == "training":
            self.state.attempts[-1][1] = time.time()
            self.state.trained = status == 0 and self.run.weights.is_file()
        if status or not self.state.trained:
            self.state.error = f"{self.phase} failed (status {status}): {self._complaint()}"
        write_state(self.run, self.state)
        if self.state.error:
            return True
        if self.phase == "training":
            self._start("testing")
            return False
        missing = [name for name in (SCORES, CLIPS) if not (self.run.folder / name).is_file()]
        if missing:
            self.state.error = f"testing left no {missing[0]}"
            write_state(self.run, self.state)
        return True

    def _start(self, phase: str) -> None:
        self.phase = phase
        if phase == "training":
            begin_attempt(self.run, self.state)
            command = self.run.command("train.sh", "--resume")
        else:
            for name in (SCORES, CLIPS):  # of an earlier checkpoint
                (self.run.folder / name).unlink(missing_ok=True)
            command = self.run.command("test.sh", str(self.run.weights))
        with (self.run.folder / LOG).open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            self._log_begin = log.tell()
            self.process = subprocess.Popen(
                command,
                cwd=self.project,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                # The command holds the run too: where this process is killed, another one waits for it.
                pass_fds=(self._lock,) if self._lock is not None else (),
            )

    def _environment(self) -> dict[str, str]:
        variables = dict(os.environ)
        if self.device is not None:
            variables["CUDA_VISIBLE_DEVICES"] = self.device
        if self.neighbours > 1:
            variables.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.neighbours)))
        return variables

    def _complaint(self) -> str:
        """What the log says went wrong: the error's line, or the first exception's, or the last line."""
        with (self.run.folder / LOG).open("rb") as log:
            log.seek(self._log_begin)
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error:")]
        exceptions = [line for line in lines if EXCEPTION.match(line)]
        return (errors[-1:] or exceptions[:1] or lines[-1:] or ["no output"])[0][:300]


class _Jobs:
    """The jobs at work; SIGTERM and Ctrl-C stop them, so that they save their state, and raise StopRequested."""

    def __init__(self) -> None:
        self.active: list[Job] = []
        self._before: dict[int, object] = {}

    def __enter__(self) -> "_Jobs":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)
        if kind is not None:
            processes = [job.process for job in self.active if job.process is not None]
            for process in processes:
                process.terminate()
            for job, process in zip(self.active, processes, strict=True):
                process.wait()
                if job.phase == "training":
                    close_attempt(job.run, job.state)
                    write_state(job.run, job.state)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _stop(self, number: int, frame: FrameType | None) -> None:
        raise StopRequested(number, None)


def unfinished(runs: Iterable[Run]) -> list[int]:
    """Positions of the runs that are not scored."""
    return [index for index, run in enumerate(runs) if not is_scored(run)]
