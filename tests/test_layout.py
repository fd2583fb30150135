"""The storeys of the house: no room imports one above it."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"utils", "ops", "model", "dataloader", "scripts", "tests"}
MAY_IMPORT = {
    "utils": set(),
    "ops": {"utils"},
    "model": {"utils", "ops"},
    "dataloader": {"utils"},
    "scripts": {"utils", "ops", "model", "dataloader"},
}


def imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.split(".")[0] for name in names} & ROOMS


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_none_above_it(room: str) -> None:
    wrong = {}
    for path in sorted((ROOT / room).rglob("*.py")):
        above = imported_rooms(path) - MAY_IMPORT[room] - {room}
        if above:
            wrong[str(path.relative_to(ROOT))] = above
    assert not wrong


def test_relative_imports_hide_no_room() -> None:
    for room in MAY_IMPORT:
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path} imports relatively"
