"""What a checkpoint's file records of its origin, and how a test differs from it.

The record is a dictionary of plain values, so that it loads without running code:
    task, config: the task and the whole config, without absolute paths.
    seed: of the run.
    commit: git commit of the code, with ' (dirty)' where tracked files were changed; None outside a repository.
    earlier_commits: commits of the run before it was resumed, where they differ.
    versions: of Python and of the packages that the numbers depend on.
    splits: name -> `describe_split` of train, val and test.
    epoch, scores: of the validation that chose the weights, from 1; in files of best weights only.
"""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dataloader import AudioVisualDataset
from dataloader.base import stored_log_mel
from dataloader.data_module import DataModule
from scripts.engine.task_metrics import CLIPS_IN_PUBLISHED_BATCH
from utils.config import SPLITS
from utils.errors import DataError
from utils.portable import portable
from utils.runtime import ROOT

PACKAGES = ("torch", "torchvision", "torchaudio", "timm", "numpy", "mmengine", "lightning")
GIT_SECONDS = 10


def provenance(cfg: Any, data: DataModule, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record of a run that starts or goes on now.

    Args:
        cfg: the whole config.
        data: of this config; its data sets are built where they are not yet.
        earlier: the record of the checkpoint that the run goes on from, if it has one.
    """
    record: dict[str, Any] = {
        "task": str(cfg.task),
        "config": portable(plain(cfg.to_dict())),  # weights files are given away
        "seed": int(cfg.process.seed),
        **origin(),
        "splits": {name: _split(data, name) for name in SPLITS},
    }
    if earlier is not None:
        before = [*earlier.get("earlier_commits", []), earlier.get("commit")]
        commits = [commit for commit in dict.fromkeys(before) if commit != record["commit"]]
        if commits:
            record["earlier_commits"] = commits
    return record


def origin() -> dict[str, Any]:
    """Commit and versions of the code that runs."""
    return {"commit": git_commit(ROOT), "versions": versions()}


def git_commit(folder: Path) -> str | None:
    """Commit of a repository, ' (dirty)' added where tracked files differ from it; None if it is none."""
    if not (folder / ".git").exists():
        return None
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} (dirty)" if changed else commit


def versions() -> dict[str, str]:
    """Versions of Python and of PACKAGES."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe_split(dataset: AudioVisualDataset) -> dict[str, Any]:
    """A split's data, and what of the metric's convention depends on it.

    Returns:
        clips: their number. digest: of the clips' names and lines in the table, and of the names and sizes of their
        frames, masks and sounds; file contents are not read, and where the data is stored does not matter.
        labelled_frames: labelled frames per clip -> number of such clips. num_frames: frames per item, padding
        included. img_size: [height, width]. f_score_batch: clips per batch of AVSBench's F (s4, ms3).
        padded_frames: 'counted as background', as published, or 'none' (avss).
    """
    digest = hashlib.sha256()
    for clip in dataset.clips:
        digest.update(repr((clip.name, sorted(clip.row.cells.items()))).encode())
        for path in (*clip.frames, *clip.masks, clip.wav, stored_log_mel(clip)):
            digest.update(f"{path.name} {_size(path)}\n".encode())
    labelled = Counter(len(clip.masks) for clip in dataset.clips)
    found: dict[str, Any] = {
        "clips": len(dataset.clips),
        "digest": digest.hexdigest()[:16],
        "labelled_frames": {str(frames): labelled[frames] for frames in sorted(labelled)},
        "num_frames": dataset.num_frames,
        "img_size": list(dataset.img_size),
    }
    if dataset.task == "avss":
        padded = any(len(clip.frames) < dataset.num_frames for clip in dataset.clips)
        found["padded_frames"] = "counted as background" if padded else "none"
    else:
        found["f_score_batch"] = CLIPS_IN_PUBLISHED_BATCH
    return found


def differences(record: Mapping[str, Any] | None, now: Mapping[str, Any], split: str) -> list[str]:
    """One line for each thing in which the data or the convention differs from those of the weights' run.

    Args:
        record: of the weights' file; None, or one without this split, gives no lines.
        now: `describe_split` of what is scored.
        split: its name.
    """
    then = ((record or {}).get("splits") or {}).get(split)
    if not then:
        return []
    lines = []
    if then["digest"] != now["digest"]:
        lines.append(
            f"the data of the split {split} differs from the run's: {now['clips']} clips (digest {now['digest']}), and "
            f"{then['clips']} ({then['digest']}) when these weights were trained."
        )
    for key, wording in _CONVENTION.items():
        if key in then and key in now and then[key] != now[key]:
            lines.append(
                f"{wording} of the split {split}: {_words(now[key])}, and {_words(then[key])} in the weights' run; the "
                "scores of the two cannot be compared."
            )
    return lines


def plain(value: Any) -> Any:
    """A config's values as dictionaries, lists, strings and numbers."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


_CONVENTION = {
    "labelled_frames": "labelled frames",
    "num_frames": "frames per item",
    "img_size": "image size",
    "f_score_batch": "clips per batch of the F-score",
    "padded_frames": "padded frames",
}


def _split(data: DataModule, name: str) -> dict[str, Any] | None:
    """A split's description; None where the table has no such split, which training does not need."""
    try:
        return describe_split(data.dataset(name))
    except DataError:
        return None


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{frames} in {clips} clips" for frames, clips in value.items())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return " x ".join(map(str, value))
    return str(value)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _git(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # `status` would otherwise write the index
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=GIT_SECONDS,
        env=environment,
    )
    return done.stdout.strip()
