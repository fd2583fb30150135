"""CSV tables of clips, and safe paths from their cells."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import DataError


@dataclass(frozen=True)
class Row:
    """One line of a table: its cells by column, its number and its file."""

    cells: Mapping[str, str]
    line: int
    table: Path

    def __getitem__(self, column: str) -> str:
        """The cell of a column."""
        return self.cells[column]

    @property
    def location(self) -> str:
        """'file.csv line 12', for messages."""
        return f"{self.table} line {self.line}"


def read_table(path: str | Path, columns: Sequence[str | tuple[str, ...]]) -> list[Row]:
    """All lines of a CSV file.

    Args:
        path: the file, UTF-8.
        columns: required names in the first line; a tuple lists alternative names of one column; rows
            store it under the first.

    Raises:
        DataError: the file is missing or not UTF-8, or lacks a column, or a line lacks a cell of these columns.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            names = _find_columns(path, [name.strip() for name in reader.fieldnames or []], columns)
            reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
            rows = []
            for cells in reader:
                values = {wanted: (cells[found] or "").strip() for wanted, found in names.items()}
                empty = [names[wanted] for wanted, value in values.items() if not value]
                if empty:
                    raise DataError(
                        f"{path} line {reader.line_num} has an empty cell in the column {', '.join(empty)}."
                    )
                rows.append(Row(values, reader.line_num, path))
    except FileNotFoundError as error:
        raise DataError(f"the table {path} is missing: check the path, or make the data first.") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"the table {path} cannot be read as UTF-8 CSV ({error}).") from error
    return rows


def all_cells(path: str | Path) -> dict[int, dict[str, str]]:
    """All cells of a CSV file that `read_table` has read, optional ones included: line -> column -> cell."""
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        found = {}
        for cells in reader:
            found[reader.line_num] = {name: (cell or "").strip() for name, cell in cells.items() if name is not None}
        return found


def rows_of_split(rows: Iterable[Row], split: str, path: str | Path) -> list[Row]:
    """The rows of one split.

    Raises:
        DataError: there are none; the message counts the rows of the other splits.
    """
    rows = list(rows)
    chosen = [row for row in rows if row["split"] == split]
    if not chosen:
        counts: dict[str, int] = {}
        for row in rows:
            counts[row["split"]] = counts.get(row["split"], 0) + 1
        there = ", ".join(f"{name!r} ({count})" for name, count in sorted(counts.items())[:8]) or "no lines at all"
        raise DataError(f"{path} has no clip of the split {split!r}; it has {there}.")
    return chosen


def component(row: Row, column: str) -> str:
    """A cell used as one folder or file name of a path.

    Raises:
        DataError: the cell is not a plain name (`..`, a slash, an absolute path, a NUL).
    """
    value = row[column]
    if value in (".", "..") or any(character in value for character in "/\\\0") or len(value) > 255:
        raise DataError(f"{row.location}: {column}={value!r} is not a plain file name.")
    return value


def inside(root: Path, path: Path, location: str = "") -> Path:
    """`path`, after checking that it stays within `root`, links resolved.

    Args:
        root: resolved folder of the data.
        path: the file.
        location: the line of the CSV, for the message.

    Raises:
        DataError: it leads outside, or is a circular link.
    """
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError) as error:
        raise DataError(f"{location or 'a path'}: {path} cannot be resolved ({error}).") from error
    if not resolved.is_relative_to(root):
        raise DataError(f"{location or 'a path'}: {path} leads to {resolved}, outside the data in {root}.")
    return path


def _find_columns(path: Path, there: Sequence[str], columns: Sequence[str | tuple[str, ...]]) -> dict[str, str]:
    found = {}
    for column in columns:
        names = (column,) if isinstance(column, str) else column
        match = next((name for name in names if name in there), None)
        if match is None:
            wanted = "' or '".join(names)
            raise DataError(f"{path} has no column '{wanted}'; its first line has: {', '.join(there) or 'nothing'}.")
        found[names[0]] = match
    return found
