"""Checks of nested options of a data set, with messages that name the key."""

import math
from collections.abc import Mapping
from typing import Any

from utils.errors import ConfigError
from utils.registry import suggestion


def checked_options(where: str, given: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults, replaced by what is given.

    Args:
        where: of the options, for messages.
        given: a dictionary.
        defaults: key -> value; None where the key is required.

    Raises:
        ConfigError: not a dictionary, an unknown key, or a required key is missing.
    """
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}={given!r}: give a dictionary with the keys {', '.join(defaults)}.")
    for key in given:
        if key not in defaults:
            raise ConfigError(f"{where}.{key} is not an option: {suggestion(str(key), list(defaults))}")
    missing = [key for key, value in defaults.items() if value is None and key not in given]
    if missing:
        raise ConfigError(f"{where} lacks the key {missing[0]}.")
    return {**defaults, **given}


def number(where: str, value: Any, least: float, most: float = math.inf) -> float:
    """A finite number within bounds.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most or value == math.inf:
        raise ConfigError(f"{where}={value!r}, expected a number {_bounds(least, most)}.")
    return float(value)


def number_range(where: str, value: Any, least: float, most: float) -> tuple[float, float]:
    """A pair of numbers within bounds, the smaller first.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, list | tuple) and len(value) == 2:
        low, high = (number(where, each, least, most) for each in value)
        if low <= high:
            return low, high
    raise ConfigError(f"{where}={value!r}, expected two numbers {_bounds(least, most)}, the smaller first.")


def _bounds(least: float, most: float) -> str:
    return f"from {least:g} up" if math.isinf(most) else f"from {least:g} to {most:g}"
