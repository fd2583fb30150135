"""Off-screen sounds: for each clip, the other clips whose sound none of its visible objects makes.

The protocol is AVSBench-Robust's (arXiv 2502.00358): the sound of another clip of the same split, from another broad
group of sounds, and never from the group that is least suitable as a contrast.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dataloader.tables import inside
from utils.errors import DataError

if TYPE_CHECKING:
    from dataloader.base import AudioVisualDataset

SOUND_LABELS = "sound_labels.json"
"""Name of the labels file beside a data set's table."""
LEAST_SUITABLE = {"music": "human", "human": "music", "animal": "human", "device": "music"}
"""Group of a clip's sound -> the group that is never its off-screen sound, as in AVSBench-Robust's code."""
NO_OBJECT = frozenset({"", "background"})
"""Entries of AVSS's column `a_obj` that name no object."""

_MEMBERS = {
    "music": """accordion bassoon bell cello clarinet cymbal drum erhu flute guitar guzheng handpan harmonica harp
        marimba piano pipa saxophone sitar sorna tabla trombone trumpet tuba ukulele violin playing_acoustic_guitar
        playing_glockenspiel playing_piano playing_tabla playing_ukulele playing_violin""",
    "human": "baby boy girl man woman baby_laughter female_singing male_speech",
    "animal": """bird cat dog donkey duck elephant goose hen horse leopard lion parrot pig sheep squirrel tiger wolf
        cat_meowing coyote_howling dog_barking horse_clip-clop lions_roaring mynah_bird_singing""",
    "device": """airplane axe boat bus car clipper clock emergency-car frying-food gun hair-dryer helicopter keyboard
        missile-rocket motorcycle mower saw tank tractor train truck utv vacuum-cleaner ambulance_siren
        cap_gun_shooting chainsawing_trees driving_buses helicopter lawn_mowing race_car typing_on_computer_keyboard""",
}
GROUPS = {label: group for group, labels in _MEMBERS.items() for label in labels.split()}
"""Classes of AVSS and categories of s4 -> group."""


@dataclass(frozen=True)
class SoundLabels:
    """What sounds and what is visible in each clip of a data set, in the order of its clips.

    Attributes:
        sounding: labels of what sounds at some time of the clip.
        visible: labels of what is visible, sounding or not; None where only the sounding objects are known.
        groups: label -> group.
        source: where the labels come from, for reports.
    """

    sounding: Sequence[frozenset[str]]
    visible: Sequence[frozenset[str] | None]
    groups: Mapping[str, str]
    source: str


def read_sound_labels(dataset: "AudioVisualDataset") -> SoundLabels | None:
    """The labels of a data set's clips, from the first source that exists; None where there is none.

    1. The JSON file that the data set's key `sound_labels` names, or `sound_labels.json` beside its table:
       `{"groups": {label: group}, "clips": {name: {"sounding": [labels], "visible": [labels]}}}`; `groups` and
       `visible` may be left out.
    2. s4: the categories of the table.
    3. avss: the column `a_obj` of the table (labels joined by `_`), else the classes in the clip's masks.
    4. ms3: `a_obj` of `AVSS/metadata.csv` beside the folder of the data set, where the clips are the rows `v1m`.

    Raises:
        DataError: the JSON file is unreadable or lacks a clip, or a mask is.
    """
    table = dataset.clips[0].row.table
    named = dataset.sound_labels
    path = Path(named) if named is not None else table.parent / SOUND_LABELS
    if named is not None or path.is_file():
        return _read_json(path, [clip.name for clip in dataset.clips])
    found, source = _labels_of_the_task(dataset, table)
    if found is None:
        return None
    return SoundLabels(found, [None] * len(found), GROUPS, source)


class Donors:
    """For each clip of a data set, the clips whose sound is off-screen in it.

    Args:
        dataset: of one split.
        other_group: True: require another group, where groups are known. False: only where it is unknown what is
            visible beside the sounding objects; elsewhere a sound that no visible object makes is enough.

    Raises:
        DataError: the data set has a single clip, or its labels cannot be read.
    """

    def __init__(self, dataset: "AudioVisualDataset", *, other_group: bool = True) -> None:
        if len(dataset.clips) < 2:
            raise DataError(f"off-screen sounds need two clips or more; {dataset.clips[0].row.table} has one.")
        self.other_group = other_group
        self.count = len(dataset.clips)
        self.labels = read_sound_labels(dataset)
        if self.labels is None:
            return
        sounding = self.labels.sounding
        visible = [heard | (seen or frozenset()) for heard, seen in zip(sounding, self.labels.visible, strict=True)]
        names = sorted(frozenset().union(*visible))
        groups = sorted(set(self.labels.groups.values()))
        self._sounding, self._visible = _table(sounding, names), _table(visible, names)
        known = [
            frozenset(self.labels.groups[name] for name in clip if name in self.labels.groups) for clip in sounding
        ]
        self._groups = _table(known, groups)
        self._grouped = np.array([all(name in self.labels.groups for name in clip) for clip in sounding])
        self._avoided = _table(
            [frozenset(LEAST_SUITABLE[group] for group in clip if group in LEAST_SUITABLE) for clip in known], groups
        )

    @property
    def source(self) -> str:
        """Where the labels come from."""
        return "none" if self.labels is None else self.labels.source

    def candidates(self, index: int) -> tuple[npt.NDArray[np.intp], str]:
        """Numbers of the clips whose sound is off-screen in a clip, and the rule that they satisfy.

        Rules: 'group': they sound, no label of theirs is visible in the clip, all their labels have a group, and none
        is of the clip's groups or of their least suitable ones. 'label', where there is none or no group is known: no
        label of theirs is visible, and no group is a least suitable one. 'none': there are none. 'any', where no labels
        are known: all other clips.
        """
        others = np.arange(self.count) != index
        if self.labels is None:
            return np.flatnonzero(others), "any"
        fitting = others & self._sounding.any(1) & ~(self._sounding & self._visible[index]).any(1)
        fitting &= ~(self._groups & self._avoided[index]).any(1)
        own = self._groups[index]
        if own.any() and (self.other_group or self.labels.visible[index] is None):
            of_other_groups = fitting & self._grouped & ~(self._groups & own).any(1)
            if of_other_groups.any():
                return np.flatnonzero(of_other_groups), "group"
        return np.flatnonzero(fitting), "label" if fitting.any() else "none"

    def choose(self, index: int, rng: np.random.Generator) -> tuple[int | None, str]:
        """One of a clip's candidates, drawn evenly, or None where there are none, and its rule."""
        candidates, rule = self.candidates(index)
        return (int(rng.choice(candidates)) if len(candidates) else None), rule


def _labels_of_the_task(dataset: "AudioVisualDataset", table: Path) -> tuple[list[frozenset[str]] | None, str]:
    if dataset.task == "s4" and all(clip.row["category"] for clip in dataset.clips):
        return [frozenset({clip.row["category"]}) for clip in dataset.clips], f"the categories of {table}"
    names = [clip.name for clip in dataset.clips]
    path = table if dataset.task == "avss" else table.parent.parent / "AVSS" / "metadata.csv"
    of_table = _audible_objects(path)
    if all(name in of_table for name in names):
        return [of_table[name] for name in names], f"a_obj of {path}"
    if dataset.task == "avss":
        return [_classes_of_masks(dataset, index) for index in range(len(names))], "the classes in the masks"
    return None, ""


def _audible_objects(path: Path) -> dict[str, frozenset[str]]:
    """Clip (by `vid` and by `uid`) -> labels in `a_obj`; empty where the table or the column is missing."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row.get("a_obj") is not None]
    except (OSError, UnicodeDecodeError, csv.Error):
        return {}
    return {
        row[key]: frozenset(row["a_obj"].split("_")) - NO_OBJECT
        for row in rows
        for key in ("vid", "uid")
        if row.get(key)
    }


def _classes_of_masks(dataset: "AudioVisualDataset", index: int) -> frozenset[str]:
    clip, root = dataset.clips[index], dataset.roots()["masks"]
    masks = [dataset.read_mask(inside(root, path, clip.row.location)) for path in clip.masks]
    present = {int(number) for mask in masks for number in np.unique(mask)} - {0}
    return frozenset(dataset.classes[number] for number in present)


def _read_json(path: Path, names: Sequence[str]) -> SoundLabels:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        groups, clips = _strings(content.get("groups", {})), content["clips"]
        missing = [name for name in names if name not in clips]
        if not missing:
            sounding = [_labels(clips[name]["sounding"]) for name in names]
            visible = [_labels(clips[name]["visible"]) if "visible" in clips[name] else None for name in names]
    except OSError as error:
        raise DataError(f"the sound labels {path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"the sound labels {path} are not of the form "
            '{"groups": {label: group}, "clips": {name: {"sounding": [labels], "visible": [labels]}}} '
            f"({type(error).__name__}: {error})."
        ) from error
    if missing:
        raise DataError(f"the sound labels {path} lack the clip {missing[0]!r} and {len(missing) - 1} more.")
    return SoundLabels(sounding, visible, {**GROUPS, **groups}, str(path))


def _labels(value: Any) -> frozenset[str]:
    if not isinstance(value, list) or not all(isinstance(label, str) for label in value):
        raise TypeError(f"{value!r} is not a list of labels")
    return frozenset(value) - NO_OBJECT


def _strings(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(group, str) for group in value.values()):
        raise TypeError(f"{value!r} does not map labels to groups")
    return value


def _table(rows: Sequence[frozenset[str]], names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """(rows, names) bool: which of the names each row has."""
    return np.array([[name in row for name in names] for row in rows], dtype=bool).reshape(len(rows), len(names))
