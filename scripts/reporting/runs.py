"""Reads what training and tests leave in a run's folder."""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from scripts.engine.clip_pictures import StoredClips
from scripts.engine.clip_scores import read_clip_scores
from scripts.engine.plots import read_rows
from utils.errors import ConfigError, DataError

CONFIG_FILE, LOG_FILE, EXPERTS_PICTURE = "config.py", "metrics.csv", "experts.png"
METRICS, ROBUST = "_metrics.json", "_robust.json"


@dataclass
class RunFolder:
    """A run.

    Attributes:
        name: of the folder, with its parents where several runs have the same.
        folder: where it is.
        config: flat key -> value, such as 'optimizer.lr' -> 0.001; empty where the folder has no config.
        rows: of metrics.csv; empty where the run was not trained here.
        tests: title of a test, such as 'test' or 'test_silence' -> what test.sh wrote.
        robust: split -> what test.sh --robust wrote.
        clips: title of a test -> name of the clip -> mIoU.
        pictures: title of a test -> pictures of its clips.
        experts: picture of the experts' load over training, if there is one.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    rows: list[dict[str, float]]
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    robust: dict[str, dict[str, Any]] = field(default_factory=dict)
    clips: dict[str, pd.Series] = field(default_factory=dict)
    pictures: dict[str, StoredClips] = field(default_factory=dict)
    experts: Path | None = None

    @property
    def task(self) -> str:
        """Of the config or of a test; empty where neither states it."""
        return str(self.config.get("task") or next((test.get("task", "") for test in self.tests.values()), ""))


def read_runs(folders: Sequence[str | Path]) -> list[RunFolder]:
    """Read runs' folders.

    Raises:
        ConfigError: a folder is missing, holds no run, or is given twice.
        DataError: a file in one is damaged.
    """
    paths = [Path(folder).resolve() for folder in folders]
    twice = [str(path) for path in dict.fromkeys(paths) if paths.count(path) > 1]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice: name each run once.")
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def read_config(path: Path) -> dict[str, Any]:
    """A run's `config.py`, flat, without running it: assignments of plain values and of `dict(...)`.

    Raises:
        DataError: it is anything else.
    """
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        sections = {_target(statement): _value(statement.value) for statement in tree.body}  # type: ignore[attr-defined]
    except (OSError, SyntaxError, ValueError, AttributeError) as error:
        raise DataError(f"{path} is not the config that a run writes ({error}).") from error
    return dict(_flat(sections))


def _read(folder: Path, name: str) -> RunFolder:
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}: name folders of runs, such as work_dir/MoDAT_pvt2_ms3.")
    config, log, experts = folder / CONFIG_FILE, folder / LOG_FILE, folder / EXPERTS_PICTURE
    run = RunFolder(
        name=name,
        folder=folder,
        config=read_config(config) if config.is_file() else {},
        rows=read_rows(log) if log.is_file() else [],
        experts=experts if experts.is_file() else None,
    )
    for path in sorted(folder.glob(f"*{METRICS}")):
        title = path.name.removesuffix(METRICS)
        run.tests[title] = _json(path)
        scores, pictures = folder / f"{title}_clips.csv", folder / f"{title}_clips.zip"
        if scores.is_file():
            run.clips[title] = read_clip_scores(scores)
        if pictures.is_file():
            run.pictures[title] = StoredClips(pictures)
    run.robust = {path.name.removesuffix(ROBUST): _json(path) for path in sorted(folder.glob(f"*{ROBUST}"))}
    if not (run.rows or run.tests or run.robust):
        raise ConfigError(
            f"{folder} holds no run: neither {LOG_FILE}, which training writes, nor results of test.sh; "
            "give a folder inside process.work_dir."
        )
    return run


def _names(paths: Sequence[Path]) -> list[str]:
    """Shortest ends of the paths that tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not readable JSON ({error}): run the test again.") from error
    if not isinstance(found, dict):
        raise DataError(f"{path} does not hold the results of a test: run the test again.")
    return found


def _target(statement: ast.stmt) -> str:
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
        raise ValueError(f"line {statement.lineno} is not an assignment")
    return statement.targets[0].id


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        given = {word.arg: _value(word.value) for word in node.keywords if word.arg is not None}
        return {**(_value(node.args[0]) if node.args else {}), **given}
    if isinstance(node, ast.Dict):
        return {ast.literal_eval(key): _value(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    return ast.literal_eval(node)


def _flat(values: Mapping[Any, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found
