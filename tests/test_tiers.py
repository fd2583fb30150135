"""The list of tests that the quick check leaves out."""

from pathlib import Path

import pytest

from tests.conftest import PROCESS

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", PROCESS)
def test_a_test_outside_the_quick_tier_exists(name: str) -> None:
    file, _, function = name.partition("::")
    assert not function or f"def {function}(" in (ROOT / file).read_text()
    assert (ROOT / file).is_file()
