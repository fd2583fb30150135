"""Records that hold on other machines: paths of this one are left out of what people publish."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from utils.runtime import ROOT


def portable(value: Any) -> Any:
    """A config or record with plain containers, whose absolute paths are shortened.

    Args:
        value: dictionaries, lists and values, nested as they like.

    Returns:
        A copy: a path inside the project is relative to the project's folder, another one its last part alone.
    """
    if isinstance(value, Mapping):
        return {key: portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, str | Path) and Path(value).is_absolute():
        path = Path(value)
        return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return value
