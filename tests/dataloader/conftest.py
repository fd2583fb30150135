"""Drawn data in all three layouts, made once, and copies of it to break."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.stamps import layouts
from scripts.stamps.library import drawn_library

SIZE = 48
CLIPS = (4, 3, 3)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with 4/3/3 clips a task of 48 pixels; do not change it."""
    root = tmp_path_factory.mktemp("drawn")
    library = drawn_library(4, seed=0)
    names = [kind.name for kind in library.kinds]
    for task in layouts.FOLDERS:
        orders = layouts.orders(task, CLIPS, names, seed=0)
        for order in orders:
            layouts.make(root, order, library, size=SIZE, seed=0)
        layouts.write_tables(root, task, orders, names)
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
    if task == "avss":
        base = root / "AVSS"
        common: dict[str, Any] = {
            "type": "V2Dataset",
            "meta_csv_path": str(base / "metadata.csv"),
            "label_idx_path": str(base / "label2idx.json"),
            "dir_base": str(base),
            "crop_img_and_mask": False,
        }
    else:
        base = root / layouts.FOLDERS[task]
        common = {
            "type": {"s4": "S4Dataset", "ms3": "MS3Dataset"}[task],
            "anno_csv": str(base / f"{task}_meta_data.csv"),
            "dir_img": str(base / f"{task}_data/visual_frames"),
            "dir_audio_log_mel": str(base / f"{task}_data/audio_log_mel"),
            "dir_mask": str(base / f"{task}_data/gt_masks"),
        }
    common |= {"img_size": (SIZE, SIZE), **more}
    return {split: {**common, "split": split} for split in ("train", "val", "test")}
