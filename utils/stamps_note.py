"""`stamps.json`, the settings that scripts/data/make_stamps.py keeps beside its data, compared with other settings."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.errors import DataError

NAME = "stamps.json"
SETTINGS = ("clips", "size", "kinds", "seed", "drawn", "version")
# Version 2 has the split `unseen`, and a donkey for the 35th kind, whose recording was silent. Data of version 1 is
# extended by the split where its kinds have remained the same.
VERSION = 2
_KINDS_OF_VERSION_1 = 34


def read_note(folder: Path) -> dict[str, Any] | None:
    """The settings of the data in a folder; None where it holds none.

    Raises:
        DataError: the file cannot be read, or holds no settings.
    """
    note = folder / NAME
    try:
        made = json.loads(note.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"{note} cannot be read ({error}): remove {folder}.") from error
    if not isinstance(made, dict):
        raise DataError(f"{note} holds no settings ({json.dumps(made)[:60]}): remove {folder}.")
    return made


def difference(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """The first of the wanted settings that the data does not have, as (key, made, wanted).

    None where all agree; the version agrees where the data can be extended to it. Keys outside `SETTINGS`, such as
    `tasks` of a config, are not compared.
    """
    for key in SETTINGS:
        if key not in wanted or (key == "version" and is_extensible(made)):
            continue
        plain = list(wanted[key]) if isinstance(wanted[key], Sequence) else wanted[key]
        if made.get(key) != plain:
            return key, made.get(key), plain
    return None


def is_extensible(made: Mapping[str, Any]) -> bool:
    """Whether the data is of an earlier version that only lacks the split `unseen`."""
    kept = made.get("drawn", False) or made.get("kinds", 0) <= _KINDS_OF_VERSION_1
    return made.get("version") == 1 and bool(kept)
