"""Fixtures: drawn data in all three layouts, made once, and copies of it to break."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.data.stamps import layouts
from scripts.data.stamps.drawn import draw
from tests.runs import dataset_cfg

SIZE = 48
CLIPS = (4, 3, 3)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 4/3/3 clips per task, 48 pixels; do not change it."""
    root = tmp_path_factory.mktemp("drawn")
    draw(root, tuple(layouts.FOLDERS), clips=CLIPS, size=SIZE, sound_labels=False)
    return root


@pytest.fixture
def own(drawn: Path, tmp_path: Path) -> Path:
    """A copy of the drawn data that a test may break."""
    return Path(shutil.copytree(drawn, tmp_path / "data", ignore=shutil.ignore_patterns("log_mel_cache")))


@pytest.fixture
def splits() -> Callable[..., dict[str, Any]]:
    """Configs of the three splits of a task: splits(root, task, key=value of every split...)."""
    return dataset_configs


def dataset_configs(root: Path, task: str, **more: Any) -> dict[str, Any]:
    return dataset_cfg(root, task, **{"img_size": (SIZE, SIZE), **more})
