"""A pass over a split: scores, pictures and saved masks."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor

from dataloader import build_dataset
from scripts.engine.task_metrics import SCALARS
from scripts.engine.testing import EverythingOracle, results_table, score
from utils.errors import DataError


class Truth:
    """Paints the labels."""

    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        return F.one_hot(batch["masks"].flatten(0, 1).long(), 71).movedim(-1, 1).float()


def test_avss_is_scored_by_class_and_its_masks_are_saved(
    drawn: Path, splits: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    cfg = splits(drawn, "avss", resize_pred_mask=True, save_pred_mask_img_size=(60, 40), batch_size=2)["test"]
    dataset = build_dataset(cfg)
    where = {"task": "avss", "folder": tmp_path, "title": "test"}
    truth = score(Truth(), dataset, masks_folder=tmp_path / "masks", **where)
    assert set(truth) == {*SCALARS["avss"], "per_class"} and list(truth["per_class"]) == dataset.classes
    present = [name for name, values in truth["per_class"].items() if values["frames"]]
    assert all(truth["per_class"][name]["iou"] == truth["per_class"][name]["f_score"] == 1 for name in present)
    assert truth["miou"] == pytest.approx(len(present) / 71) and 2 < len(present) < 8
    # Every clip has its ten frames counted, padding as background, and every real frame has a label outside training.
    assert truth["per_class"]["background"]["frames"] == 10 * len(dataset)
    assert (tmp_path / "images/test.png").stat().st_size > 0

    saved = list((tmp_path / "masks").rglob("*.png"))
    assert len(saved) == sum(len(clip.frames) for clip in dataset.clips)
    assert {Image.open(path).size for path in saved} == {(60, 40)}  # width, height

    oracle = score(EverythingOracle(cfg, "dataset.test"), dataset, **where)
    assert 0 < oracle["miou"] < truth["miou"]  # it paints the silent objects too
    console = Console(record=True, width=100)
    console.print(results_table(oracle, "avss"))
    assert "background (iou / F)" in console.export_text()


def test_an_oracle_needs_masks_of_all_objects(own: Path, splits: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    for path in own.rglob("all_objects*"):
        path.rename(path.with_name("gone"))
    for task in ("ms3", "avss"):
        with pytest.raises(DataError, match="needs the masks of all objects"):
            EverythingOracle(splits(own, task)["test"], "dataset.test")
