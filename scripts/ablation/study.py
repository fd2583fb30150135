"""What a study consists of, and what its folder says of each run.

work_dir/NAME/seed0/CONFIG/        a run, as train.sh and test.sh leave it; beside their files:
    ablation.json                  digest of its config, seconds of its attempts, whether it is trained and scored
    ablation.log                   what train.sh and test.sh printed
work_dir/NAME/table.{md,csv,tex}   the table; runs.csv: one line per run
"""

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.engine.task_metrics import BEST_FILES
from utils.config import load_config
from utils.errors import ConfigError
from utils.files import LAST, atomic_path
from utils.runtime import ROOT, find_file

STATE = "ablation.json"
LOG = "ablation.log"
SCORES = "test_metrics.json"
CLIPS = "test_clips.csv"
CACHES = (".audio_cache", ".backbone_cache")


@dataclass(frozen=True)
class Run:
    """One config with one seed.

    Attributes:
        task: 's4', 'ms3' or 'avss'.
        config: its file.
        seed: `process.seed`.
        parent: `process.work_dir` of the run; the run's folder is below it.
        overrides: `key=value` of the study, without seed and folder.
        digest: of the loaded config, whatever its folder.
    """

    task: str
    config: Path
    seed: int
    parent: Path
    overrides: tuple[str, ...]
    digest: str

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.parent / self.config.stem

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.config.stem}, seed {self.seed}"

    @property
    def weights(self) -> Path:
        """The weights that are scored: of the epoch with the best mIoU."""
        return self.folder / next(iter(BEST_FILES[self.task]))

    def command(self, script: str, *arguments: str) -> list[str]:
        """`bash train.sh` or `bash test.sh` with this run's config, seed and folder."""
        options = [*self.overrides, f"process.seed={self.seed}", f"process.work_dir={self.parent}"]
        return ["bash", script, self.task, str(self.config), *arguments, *options]


@dataclass
class State:
    """What is known of a run.

    Attributes:
        digest: of the config that it was begun with.
        attempts: (begin, end) of each training, seconds since 1970; the end of one that was killed is that of its last
            checkpoint.
        trained: whether training is done.
        error: the last failure, '' for none.
    """

    digest: str
    attempts: list[list[float]] = field(default_factory=list)
    trained: bool = False
    error: str = ""

    @property
    def minutes(self) -> float:
        """Of all training."""
        return sum(end - begin for begin, end in self.attempts) / 60


def read_state(run: Run) -> State | None:
    """The state of a run, None where it has not begun.

    Raises:
        ConfigError: the file is damaged.
    """
    path = run.folder / STATE
    try:
        return State(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): remove {run.folder}, and the run begins anew.") from error


def write_state(run: Run, state: State) -> None:
    """Write the state of a run, atomically."""
    with atomic_path(run.folder / STATE) as part:
        part.write_text(json.dumps(vars(state), indent=1) + "\n")


def begin_attempt(run: Run, state: State) -> None:
    """Note that training begins now, and where an earlier attempt, that was killed, had come to."""
    close_attempt(run, state)
    now = time.time()
    state.attempts.append([now, now])
    write_state(run, state)


def close_attempt(run: Run, state: State) -> None:
    """Give an attempt without an end that of its last checkpoint."""
    last = run.folder / LAST
    if state.attempts and state.attempts[-1][0] == state.attempts[-1][1] and last.is_file():
        state.attempts[-1][1] = max(state.attempts[-1][0], last.stat().st_mtime)


def is_scored(run: Run) -> bool:
    """Whether the run is finished: trained as its config says, and scored clip by clip."""
    state = read_state(run)
    scored = (run.folder / SCORES).is_file() and (run.folder / CLIPS).is_file()
    return state is not None and state.digest == run.digest and state.trained and scored


@contextlib.contextmanager
def working(run: Run) -> Iterator[int | None]:
    """Hold a run against other commands; gives a descriptor, or None where another process works on it.

    A process that inherits the descriptor holds the run too, also after this one is killed.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / ".ablation.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file.fileno()


@dataclass(frozen=True)
class Study:
    """Configs x seeds.

    Attributes:
        folder: of the study.
        configs: the rows of the table, in order.
        seeds: number of seeds, from 0.
        runs: all, seed by seed, so that the table has all rows early.
    """

    folder: Path
    configs: tuple[Path, ...]
    seeds: int
    runs: tuple[Run, ...]

    @property
    def task(self) -> str:
        """Of all runs."""
        return self.runs[0].task

    def of(self, config: Path) -> list[Run]:
        """The runs of a config, by seed."""
        return [run for run in self.runs if run.config == config]


def plan(configs: Sequence[str], *, seeds: int, task: str | None, name: str, overrides: Sequence[str]) -> Study:
    """Load all configs and lay out their runs.

    Args:
        configs: files, relative to the working directory or the project.
        seeds: number of seeds.
        task: that all configs must be of; None takes the first one's.
        name: of the study's folder below `process.work_dir`.
        overrides: `key=value` for all configs.

    Raises:
        ConfigError: a config cannot be read or is of another task; two have one name; an override that the study sets.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: give 1 or more.")
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"--name {name!r}: give the plain name of a folder.")
    for override in overrides:
        if override.startswith("process.seed="):
            raise ConfigError(f"{override}: a study has the seeds 0 to N - 1; give their number, --seeds N.")
    paths = list(dict.fromkeys(find_file(config, "the config") for config in configs))
    stems = [path.stem for path in paths]
    for stem in stems:
        if stems.count(stem) > 1:
            twins = " and ".join(str(path) for path in paths if path.stem == stem)
            raise ConfigError(f"{twins} have the same name, which is that of their rows and folders: rename one.")
    loaded: list[Any] = []
    for path in paths:
        cfg = load_config(path, overrides, task)
        if loaded and cfg.task != loaded[0].task:
            raise ConfigError(
                f"{paths[0].name} is of {loaded[0].task} and {path.name} of {cfg.task}: a table compares one task."
            )
        loaded.append(cfg)
    folder = (ROOT / str(loaded[0].process.work_dir) / name).resolve()
    own = tuple(override for override in overrides if not override.startswith("process.work_dir="))
    runs = tuple(
        Run(str(cfg.task), path, seed, folder / f"seed{seed}", own, digest(cfg))
        for seed in range(seeds)
        for path, cfg in zip(paths, loaded, strict=True)
    )
    return Study(folder, tuple(paths), seeds, runs)


def digest(cfg: Any) -> str:
    """Of what determines a run's scores: everything but where it is written and how fast it is computed."""
    content = cfg.to_dict()
    content["process"] = {
        key: value for key, value in content["process"].items() if key not in ("work_dir", "seed", "num_workers")
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def share_caches(study: Study) -> None:
    """Let all seeds use one cache of frozen features: it goes by weights and input, and not by seed."""
    for run in study.runs:
        for cache in CACHES:
            (study.folder / cache).mkdir(parents=True, exist_ok=True)
            run.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                (run.parent / cache).symlink_to(Path("..") / cache)
