"""Pictures: what is written, where, and what it shows."""

import numpy as np
import pytest
import torch
from PIL import Image

from dataloader.palette import decode, palette
from scripts.engine.plots import read_curves, save_curves
from scripts.engine.visualize import clip_rows, predicted_classes, save_masks, save_sheet
from utils.errors import DataError


def clip(classes=1, t=3, size=32, seed=0):
    g = torch.Generator().manual_seed(seed)
    masks = torch.zeros(t, size, size, dtype=torch.uint8)
    masks[:, 8:24, 8:24] = 1 if classes == 1 else 5
    return {
        "name": "a_rather_long_clip_name_of_avsbench_0001",
        "frames": torch.randn(t, 3, size, size, generator=g),
        "log_mel": torch.randn(t, 1, 96, 64, generator=g),
        "masks": masks,
        "logits": torch.randn(t, classes, size, size, generator=g),
        "gt_temporal_mask_flag": torch.tensor([1.0] + [0.0] * (t - 1)),
        "vid_temporal_mask_flag": torch.tensor([1.0] * (t - 1) + [0.0]),
    }


def rows_of(item):
    predictions = predicted_classes(item.pop("logits"))
    return {**item, "predictions": predictions}


def test_rows_leave_out_padding_and_unlabelled_truth():
    rows = clip_rows(**rows_of(clip()))
    assert [row.truth is None for row in rows] == [False, True]
    assert rows[1].title.endswith("second 2")


@pytest.mark.parametrize("classes", [1, 71])
def test_sheet_is_a_readable_picture_and_the_same_bytes_again(tmp_path, classes):
    names = ["background", "object"] if classes == 1 else [f"class {i}" for i in range(71)]
    rows = clip_rows(**rows_of(clip(classes)))
    for file in ("a.png", "b.png"):
        save_sheet(tmp_path / "new" / file, rows, classes=names, title="test")
    assert (tmp_path / "new" / "a.png").read_bytes() == (tmp_path / "new" / "b.png").read_bytes()
    picture = np.asarray(Image.open(tmp_path / "new" / "a.png").convert("RGB"))
    assert picture.shape[1] == 960 and picture.shape[0] > 300
    assert picture.std() > 20


def test_sheet_shows_the_frame_in_its_own_colours_and_the_mask_over_it(tmp_path):
    item = clip(t=2, size=64)
    item["frames"][:] = (torch.tensor([0.1, 0.6, 0.2]) - torch.tensor([0.485, 0.456, 0.406]))[
        :, None, None
    ] / torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    item["logits"] = torch.where(item["masks"][:, None] > 0, 9.0, -9.0)
    save_sheet(tmp_path / "sheet.png", clip_rows(**rows_of(item)), classes=["background", "object"])
    picture = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).reshape(-1, 3)
    green, object_over_green = (26, 153, 51), (174, 144, 17)
    for colour in (green, object_over_green):
        assert (np.abs(picture.astype(int) - colour).max(1) <= 2).sum() > 500, colour


def test_object_masks_have_avsbenchs_names_and_values(tmp_path):
    predictions = torch.zeros(2, 6, 8, dtype=torch.uint8)
    predictions[1, :3] = 1
    files = save_masks(tmp_path, "clip_1", predictions, category="dog")
    assert [str(file.relative_to(tmp_path)) for file in files] == ["dog/clip_1/clip_1_0.png", "dog/clip_1/clip_1_1.png"]
    mask = Image.open(files[1])
    assert mask.mode == "L" and mask.size == (8, 6)
    np.testing.assert_array_equal(np.asarray(mask), predictions[1].numpy() * 255)


def test_semantic_masks_are_coloured_by_the_palette(tmp_path):
    predictions = torch.arange(71, dtype=torch.uint8).repeat(2).reshape(1, 2, 71)
    (file,) = save_masks(tmp_path, "clip_1", predictions, semantic=True)
    assert file == tmp_path / "clip_1" / "clip_1_0.png"
    colours = np.asarray(Image.open(file))
    np.testing.assert_array_equal(colours[0], palette())
    np.testing.assert_array_equal(decode(colours), predictions[0].numpy())


@pytest.mark.parametrize("name", ["../out", "a/b", "..", "a\\b"])
def test_masks_stay_in_their_folder(tmp_path, name):
    with pytest.raises(DataError, match="not a plain file name"):
        save_masks(tmp_path, name, torch.zeros(1, 2, 2))
    assert not list(tmp_path.iterdir())


def test_classes_are_predicted_as_the_metrics_count_them():
    assert predicted_classes(torch.tensor([-1.0, 0.0, 1.0]).view(1, 1, 1, 3)).flatten().tolist() == [0, 0, 1]
    assert predicted_classes(torch.eye(3).view(1, 3, 1, 3)).flatten().tolist() == [0, 1, 2]


LOG = """epoch,step,lr,train_total,train_iou_loss,val_miou,val_f_score
0,10,0.001,0.8,0.6,,
0,20,0.001,0.6,0.4,,
0,20,,,,0.25,0.35
1,30,0.001,0.5,nan,,
1,40,,,,0.5,0.6
"""


def test_curves_are_epoch_means(tmp_path):
    (tmp_path / "metrics.csv").write_text(LOG)
    curves = read_curves(tmp_path / "metrics.csv")
    assert curves["train_total"] == {0: pytest.approx(0.7), 1: 0.5}
    assert curves["train_iou_loss"] == {0: 0.5}
    assert curves["val_miou"] == {0: 0.25, 1: 0.5}
    assert "step" not in curves
    save_curves(tmp_path / "metrics.csv", tmp_path / "curves.png", title="run")
    assert np.asarray(Image.open(tmp_path / "curves.png").convert("L")).std() > 5


def test_curves_of_an_empty_log_are_drawn_and_faulty_logs_named(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    save_curves(tmp_path / "empty.csv", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").is_file()
    with pytest.raises(DataError, match=r"missing\.csv: the log cannot be read"):
        save_curves(tmp_path / "missing.csv", tmp_path / "curves.png")
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no column 'epoch', only a, b"):
        save_curves(tmp_path / "bad.csv", tmp_path / "curves.png")


def test_sheet_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        save_sheet(tmp_path / "sheet.png", [], classes=["background", "object"])
