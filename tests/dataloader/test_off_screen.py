"""Off-screen sounds: which clips may lend theirs, by hand-made tables and by the labels of drawn data."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dataloader import build_dataset
from dataloader.audio_ablation import ReplacedSound
from dataloader.off_screen import GROUPS, LEAST_SUITABLE, Donors, read_sound_labels
from scripts.data.stamps import layouts
from utils.errors import DataError

Splits = Callable[..., dict[str, Any]]


def dataset(folder: Path, clips: dict[str, Any], groups: dict[str, str] | None = None) -> Any:
    """Clips with labels in a JSON file, and nothing else."""
    (folder / "sound_labels.json").write_text(json.dumps({"groups": groups or {}, "clips": clips}))
    row = SimpleNamespace(table=folder / "table.csv")
    return SimpleNamespace(clips=[SimpleNamespace(name=name, row=row) for name in clips], sound_labels=None)


def heard(*sounding: str, also: tuple[str, ...] = ()) -> dict[str, list[str]]:
    return {"sounding": list(sounding), "visible": [*sounding, *also]}


def donors_of(data: Any, name: str, **options: Any) -> tuple[set[str], str]:
    names = [clip.name for clip in data.clips]
    found, rule = Donors(data, **options).candidates(names.index(name))
    return {names[number] for number in found}, rule


CLIPS = {
    "dog": heard("dog", also=("guitar",)),
    "cat": heard("cat"),
    "man": heard("man"),
    "guitar": heard("guitar"),
    "piano": heard("piano"),
    "bus": heard("bus"),
    "dog and bus": heard("dog", "bus"),
    "silent": heard(also=("bus",)),
}


def test_a_donor_is_of_another_group_is_not_visible_and_not_least_suitable(tmp_path: Path) -> None:
    data = dataset(tmp_path, CLIPS)
    # No animal, no human (least suitable for an animal), no guitar (visible), no silent clip.
    assert donors_of(data, "dog") == ({"piano", "bus"}, "group")
    assert donors_of(data, "man") == ({"dog", "cat", "bus", "dog and bus"}, "group")  # no music
    assert donors_of(data, "bus") == ({"dog", "cat", "man"}, "group")  # no music
    assert donors_of(data, "guitar") == ({"dog", "cat", "bus", "dog and bus"}, "group")
    # Animal and device are its own, human is least suitable for animals and music for devices: a label must do.
    assert donors_of(data, "dog and bus") == ({"cat"}, "label")
    assert donors_of(data, "silent") == ({"dog", "cat", "man", "guitar", "piano"}, "label")


def test_training_takes_any_sound_that_no_visible_object_makes(tmp_path: Path) -> None:
    data = dataset(tmp_path, CLIPS)
    assert donors_of(data, "dog", other_group=False) == ({"cat", "piano", "bus"}, "label")
    unknown = {name: {"sounding": clip["sounding"]} for name, clip in CLIPS.items()}
    assert donors_of(dataset(tmp_path, unknown), "dog", other_group=False) == ({"guitar", "piano", "bus"}, "group")


def test_without_groups_the_labels_must_differ_and_without_labels_any_clip_will_do(tmp_path: Path) -> None:
    clips = {"a": heard("x", also=("y",)), "b": heard("y"), "c": heard("z"), "d": heard("x")}
    assert donors_of(dataset(tmp_path, clips), "a") == ({"c"}, "label")
    assert donors_of(dataset(tmp_path, {"a": heard("x"), "b": heard("x")}), "a") == (set(), "none")
    with pytest.raises(DataError, match="two clips or more"):
        Donors(dataset(tmp_path, {"a": heard("x")}))


def test_every_draw_is_a_candidate_and_the_same_again(tmp_path: Path) -> None:
    donors = Donors(dataset(tmp_path, CLIPS))
    drawn = [donors.choose(0, np.random.default_rng((5, turn)))[0] for turn in range(30)]
    assert set(drawn) == {4, 5}
    assert drawn == [donors.choose(0, np.random.default_rng((5, turn)))[0] for turn in range(30)]


def test_groups_are_those_of_avsbench_robust() -> None:
    assert set(GROUPS.values()) == {"music", "human", "animal", "device"} == set(LEAST_SUITABLE)
    assert GROUPS["playing_tabla"] == "music" and GROUPS["lions_roaring"] == "animal" and GROUPS["gun"] == "device"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not of the form"),
        ('{"clips": {"a": {"sounding": "dog"}}}', "'dog' is not a list of labels"),
        ('{"clips": {"b": {"sounding": ["dog"]}}}', "lack the clip 'a'"),
        ('{"groups": {"dog": 1}, "clips": {}}', "does not map labels to groups"),
        ("{", "not of the form"),
    ],
)
def test_faulty_labels_are_named(tmp_path: Path, text: str, message: str) -> None:
    data = dataset(tmp_path, {"a": heard("dog")})
    (tmp_path / "sound_labels.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_sound_labels(data)
    data.sound_labels = str(tmp_path / "nowhere.json")
    with pytest.raises(DataError, match=r"nowhere\.json cannot be read"):
        read_sound_labels(data)


def write_labels(root: Path, task: str) -> dict[str, Any]:
    """The labels file of the drawn data."""
    names = [f"shape-{number}" for number in range(4)]
    made = layouts.orders(task, (4, 3, 3), names, 0)
    layouts.write_sound_labels(root, task, made, names, unseen=[], seed=0)
    content: dict[str, Any] = json.loads(layouts.sound_labels(root, task).read_text())
    return content


def test_labels_of_stamps_are_what_the_masks_show(own: Path, splits: Splits) -> None:
    clips = write_labels(own, "avss")["clips"]
    for split in ("val", "test"):
        data = build_dataset(splits(own, "avss")[split])
        for clip in data.clips:
            shown = {data.classes[n] for path in clip.masks for n in np.unique(data.read_mask(path)) if n}
            assert shown == set(clips[clip.name]["sounding"]) <= set(clips[clip.name]["visible"])


@pytest.mark.parametrize("task", ["s4", "ms3", "avss"])
def test_every_task_hears_off_screen_sounds_with_and_without_a_labels_file(
    own: Path, splits: Splits, task: str
) -> None:
    data = build_dataset(splits(own, task)["train"])
    source = {"s4": "categories", "ms3": "none", "avss": "classes in the masks"}[task]
    assert source in Donors(data).source
    content = write_labels(own, task)
    items = ReplacedSound(data, "off_screen", 3)
    assert items.labels.endswith("sound_labels.json") and sum(items.rules.values()) == len(data)
    for index, other in enumerate(items.other):
        item, clip = items[index], data.clips[index]
        real = len(clip.frames)
        assert other != index and bool(item["counted"]) == (other is not None)
        if other is None:
            continue
        donor = data.clips[other]
        log_mel = data.read_log_mel(donor)
        assert torch.equal(item["log_mel"][:real], log_mel[torch.arange(real) % len(log_mel)])
        assert not item["log_mel"][real:].any() and torch.equal(item["masks"], data[index]["masks"])
        visible, sounding = (content["clips"][c.name][k] for c, k in ((clip, "visible"), (donor, "sounding")))
        assert not set(visible) & set(sounding)
    assert items.rules.get("none", 0) < len(data)


def test_ms3_takes_its_labels_from_the_table_of_avss(own: Path, splits: Splits) -> None:
    data = build_dataset(splits(own, "ms3")["val"])
    with (own / "AVSS/metadata.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["vid", "uid", "s_min", "s_sec", "a_obj", "split", "label"])
        for clip, objects in zip(data.clips, ("dog_man", "guitar", "background_bus"), strict=True):
            writer.writerow([clip.name, f"{clip.name}_0", 0, 0, objects, "val", "v1m"])
    labels = read_sound_labels(data)
    assert labels is not None and "metadata.csv" in labels.source
    assert list(labels.sounding) == [{"dog", "man"}, {"guitar"}, {"bus"}]
    found, rule = Donors(data).candidates(0)
    assert (found.tolist(), rule) == ([2], "group")
