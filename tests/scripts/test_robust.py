"""Four sounds and one split: scores, balanced scores, and the sheet."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torch import Tensor

from dataloader import AudioVisualDataset, build_dataset
from scripts.engine.robust import BALANCED, balanced_scores, robust_table, score_robust, shown_frames
from scripts.engine.task_metrics import DATASET_SCALARS, SCALARS
from tests.runs import write_config

CONDITIONS = ("own", "silence", "noise", "off_screen")
Splits = Callable[..., dict[str, Any]]


class Painter:
    """Paints the labels of clips that it hears with their own sound, or of all clips."""

    def __init__(self, dataset: AudioVisualDataset, *, listens: bool) -> None:
        self.dataset, self.listens = dataset, listens

    def logits(self, batch: Mapping[str, Any], first_clip: int) -> Tensor:
        return torch.cat([self._clip(batch, clip, first_clip + clip) for clip in range(len(batch["name"]))])

    def _clip(self, batch: Mapping[str, Any], clip: int, index: int) -> Tensor:
        own = torch.equal(batch["log_mel"][clip], self.dataset[index]["log_mel"])
        classes = batch["masks"][clip].long() * (own or not self.listens)
        if self.dataset.num_classes == 1:
            return torch.where(classes > 0, 9.0, -9.0)[:, None]
        return 9 * F.one_hot(classes, self.dataset.num_classes).movedim(-1, 1).float()


def scored(splits: Splits, root: Path, task: str, folder: Path, *, listens: bool) -> tuple[dict[str, Any], Any]:
    dataset = build_dataset(splits(root, task, batch_size=2)["test"])
    painter = Painter(dataset, listens=listens)
    return score_robust(painter, dataset, task=task, folder=folder, title="test_robust", seed=0), dataset


def test_who_listens_and_who_does_not(drawn: Path, splits: Splits, tmp_path: Path) -> None:
    found, dataset = scored(splits, drawn, "ms3", tmp_path, listens=True)
    masks = torch.stack([item["masks"] for item in dataset])
    silent = float((masks.flatten(2).sum(2) == 0).float().mean())
    painted = float((masks > 0).float().mean())
    assert 0 < silent < 1 and set(found["conditions"]) == set(CONDITIONS)
    own, silence = found["conditions"]["own"], found["conditions"]["silence"]
    assert set(own) == {*SCALARS["ms3"], *DATASET_SCALARS, "fpr", "miou_with_object"}
    assert own["miou_with_object"] == 1 and silence["miou_with_object"] == 0
    assert found["balanced"]["silence"]["miou_with_object"] == 1  # not bounded by the silent frames
    assert own["miou"] == own["miou_dataset"] == 1 and own["fpr"] == pytest.approx(painted)
    assert silence["fpr"] == 0 and silence["miou"] == pytest.approx(silent)  # the masks stay
    assert found["balanced"]["silence"]["miou"] == pytest.approx(2 * (1 - silent) / (2 - silent))
    everything = silence["f_score"]  # F of all pixels, which AVSBench's threshold 0 predicts in any map
    assert 0 < everything < 0.3 and found["balanced"]["mean"]["f_score"] == pytest.approx(
        2 * (1 - everything) / (2 - everything)
    )
    assert found["off_screen"]["rules"] == {"any": 3} and set(found["off_screen"]["sounds"]) == {
        clip.name for clip in dataset.clips
    }
    found, _ = scored(splits, drawn, "ms3", tmp_path, listens=False)
    assert found["conditions"]["noise"] == found["conditions"]["own"] and found["balanced"]["mean"]["miou"] == 0


@pytest.mark.parametrize("task", ["s4", "avss"])
def test_every_task_is_scored_and_drawn(drawn: Path, splits: Splits, tmp_path: Path, task: str) -> None:
    found, _ = scored(splits, drawn, task, tmp_path, listens=True)
    assert set(found["balanced"]["mean"]) == set(BALANCED[task])
    # AVSS averages over 71 classes, of which few occur in three clips.
    foreground = "miou_foreground" if task == "avss" else "miou"
    assert found["balanced"]["mean"][foreground] > found["conditions"]["own"][foreground] - 1e-6
    assert found["conditions"]["off_screen"]["fpr"] == 0 < found["conditions"]["own"]["fpr"]
    image = np.asarray(Image.open(tmp_path / "images/test_robust.png").convert("RGB"))
    assert image.shape[1] > 1000 and image.std() > 20
    console = Console(record=True, width=80)
    console.print(robust_table(found, "title"))
    text = console.export_text()
    assert "\u2026" not in text, "a column was cut"
    assert all(
        word in text
        for word in ("off-screen", "mean of 3", "FPR", "white noise", f"{100 * found['balanced']['mean']['miou']:.1f}")
    )


def test_balanced_scores_are_those_of_each_condition_and_of_their_mean() -> None:
    conditions = {name: {"miou": value} for name, value in zip(CONDITIONS, (0.8, 0.2, 0.0, 0.4), strict=True)}
    found = {name: values["miou"] for name, values in balanced_scores(conditions, ("miou",)).items()}
    assert found["silence"] == pytest.approx(0.8)
    assert found["noise"] == pytest.approx(2 * 0.8 / 1.8)
    assert found["off_screen"] == pytest.approx(2 * 0.8 * 0.6 / 1.4)
    assert found["mean"] == pytest.approx(0.8)


def test_a_sheet_shows_frames_in_which_something_sounds() -> None:
    masks, real = torch.zeros(6, 2, 2), torch.tensor([1, 1, 1, 1, 1, 0])
    assert shown_frames(masks, real) == [0, 2]
    masks[1] = masks[3] = masks[4] = 1
    assert shown_frames(masks, real) == [1, 3]


@pytest.mark.parametrize(
    "extra", [["--audio", "silence", "w.pth"], ["--oracle"], ["--save-masks", "w.pth"]], ids=lambda words: words[0]
)
def test_robust_excludes_what_chooses_sounds_or_writes_masks(extra: list[str], capsys: Any) -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from test import parse

    with pytest.raises(SystemExit):
        parse(["ms3", "c.py", "--robust", *extra])
    assert "--robust chooses the sounds" in capsys.readouterr().err


def test_the_train_split_is_scored_without_negatives_and_augmentation(drawn: Path, tmp_path: Path) -> None:
    from test import split_config
    from utils.config import load_config

    cfg = load_config(write_config(tmp_path / "tiny.py", drawn))
    cfg.dataset.train.negatives = {"rate": 1.0}
    kept, where = split_config(cfg, "train")
    assert "negatives" not in kept and where == "dataset.train" and kept["type"] == "MS3Dataset"
    assert json.dumps(kept)


def test_clips_without_an_off_screen_sound_are_left_out_of_that_condition(
    own: Path, splits: Splits, tmp_path: Path
) -> None:
    dataset = build_dataset(splits(own, "avss", batch_size=2)["test"])
    third = dataset.clips[2].name

    def scored_with(*labels: list[str]) -> dict[str, Any]:
        """With the visible labels of each clip, of which the first sounds."""
        clips = {
            clip.name: {"sounding": visible[:1], "visible": visible}
            for clip, visible in zip(dataset.clips, labels, strict=True)
        }
        (own / "AVSS/sound_labels.json").write_text(json.dumps({"clips": clips}))
        painter = Painter(dataset, listens=False)
        return score_robust(painter, dataset, task="avss", folder=tmp_path, title="t", seed=0)

    found = scored_with(["x", "y"], ["x"], ["y"])
    assert list(found["off_screen"]["sounds"].values())[:2] == [None, third]
    assert found["off_screen"]["rules"] == {"none": 1, "label": 2}
    share = [
        float((dataset[index]["masks"][: len(clip.frames)] > 0).float().mean())
        for index, clip in enumerate(dataset.clips)
    ]
    frames = [len(clip.frames) for clip in dataset.clips]
    fpr = {name: values["fpr"] for name, values in found["conditions"].items()}
    assert fpr["own"] == fpr["silence"] == pytest.approx(np.average(share, weights=frames))
    assert fpr["off_screen"] == pytest.approx(np.average(share[1:], weights=frames[1:]))

    found = scored_with(["x"], ["x"], ["x"])
    assert set(found["conditions"]) == {"own", "silence", "noise"} and set(found["balanced"]) == {
        "silence",
        "noise",
        "mean",
    }
    Console(record=True).print(robust_table(found, "title"))
