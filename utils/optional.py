"""Packages that only some options need."""

import importlib
from typing import Any

from utils.errors import ConfigError


def import_optional(package: str, needed_by: str) -> Any:
    """Import a package that is not in requirements.txt.

    Raises:
        ConfigError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"{needed_by} needs the package {package}: pip install {package}") from error
