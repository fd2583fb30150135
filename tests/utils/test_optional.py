"""Optional packages."""

import pytest

from utils.errors import ConfigError
from utils.optional import import_optional


def test_missing_package_is_named() -> None:
    with pytest.raises(ConfigError, match="an option needs the package no_such_package: pip install no_such_package"):
        import_optional("no_such_package", "an option")


def test_installed_package_is_imported() -> None:
    assert import_optional("json", "an option").dumps(1) == "1"
