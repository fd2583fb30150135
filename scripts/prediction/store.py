"""Predicted masks on disk while a video is worked on: appended one by one, read again in order, resumable.

`predictions.jsonl` has one line per mask: number, time, painted share, areas of the classes; its first line holds the
options. `predictions.bin` holds the masks of the model's size, compressed. A line is written after its mask, so that
what an interrupted run leaves is whole up to its last line.
"""

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.prediction.model import Planes
from utils.errors import ConfigError

LINES = "predictions.jsonl"
BYTES = "predictions.bin"


class MaskStore:
    """Masks of one video, in its folder of results.

    Args:
        folder: made where it is missing.
        options: what the masks depend on; compared with those of the run that made the folder.
        shape: (P, H, W) of a mask.

    Raises:
        ConfigError: the folder has masks that were made with other options.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], shape: tuple[int, ...]) -> None:
        self.lines, self.bytes = folder / LINES, folder / BYTES
        self.shape = shape
        folder.mkdir(parents=True, exist_ok=True)
        self.count, size, kept = 0, 0, 0
        if self.lines.is_file():
            with self.lines.open("rb") as file:
                header = _decoded(file.readline())
                if header is not None:
                    refuse_other_options(folder, header.get("options", {}), options)
                    kept = file.tell()
                    stored = self.bytes.stat().st_size if self.bytes.is_file() else 0
                    for line in file:
                        record = _decoded(line)
                        if record is None or record["end"] > stored:
                            break
                        self.count, size, kept = record["index"] + 1, record["end"], kept + len(line)
        self._lines, self._bytes = self.lines.open("ab"), self.bytes.open("ab")
        self._lines.truncate(kept)
        self._bytes.truncate(size)
        self._size = size
        if not kept:
            self._write({"options": dict(options)})

    def append(self, record: Mapping[str, Any], mask: Planes) -> None:
        """Store the next mask (P, H, W) with what is reported of it."""
        data = zlib.compress(mask.tobytes(), 1)
        self._bytes.write(data)
        self._bytes.flush()
        self._size += len(data)
        self._write({"index": self.count, **record, "end": self._size})
        self.count += 1

    def records(self) -> Iterator[dict[str, Any]]:
        """What is reported of the masks, in order."""
        with self.lines.open("rb") as file:
            file.readline()
            for line in file:
                record: dict[str, Any] = json.loads(line)
                del record["index"], record["end"]
                yield record

    def masks(self) -> Iterator[Planes]:
        """The masks (P, H, W), in order."""
        with self.lines.open("rb") as lines, self.bytes.open("rb") as data:
            lines.readline()
            for line in lines:
                compressed = data.read(json.loads(line)["end"] - data.tell())
                yield np.frombuffer(zlib.decompress(compressed), np.uint8).reshape(self.shape)

    def close(self) -> None:
        """Close the files."""
        self._lines.close()
        self._bytes.close()

    def remove(self) -> None:
        """Close the files and remove them."""
        self.close()
        self.lines.unlink(missing_ok=True)
        self.bytes.unlink(missing_ok=True)

    def _write(self, record: Mapping[str, Any]) -> None:
        self._lines.write(json.dumps(record).encode() + b"\n")
        self._lines.flush()


def refuse_other_options(folder: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise ConfigError if a folder was made with other options."""
    for key, value in wanted.items():
        before = made.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            refuse_other_options(folder, before, value)
        elif before != value:
            raise ConfigError(
                f"{folder} was made with {key}={before!r}, and now {key}={value!r}: --overwrite makes it "
                "anew, --out DIR writes elsewhere."
            )


def _decoded(line: bytes) -> dict[str, Any] | None:
    """A whole line of JSON; None for one that was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
