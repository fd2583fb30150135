"""Options of a prediction, and the form in which they are stored beside its results."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from utils.errors import ConfigError, DataError

BETWEEN, MASK_FORMS = ("hold", "blend"), ("png", "video", "none")


@dataclass(frozen=True)
class Options:
    """What is predicted and written.

    Attributes:
        fps: masks per second, at most one per picture.
        between: 'hold' or 'blend' (linearly): masks of the pictures between two predictions.
        masks: 'png' (a PNG per prediction), 'video' (a .mov with alpha) or 'none'.
        threshold: of the probability, for painted shares and the overlay.
        silent: continue with silence where there is no sound.
        sound: a file whose sound replaces the video's.
        fps_in: pictures per second of a folder.

    Raises:
        ConfigError: a value out of range.
    """

    fps: float = 1.0
    between: str = "hold"
    masks: str = "png"
    threshold: float = 0.5
    silent: bool = False
    sound: Path | None = None
    fps_in: float = 1.0

    def __post_init__(self) -> None:
        if self.sound is not None:
            object.__setattr__(self, "sound", Path(self.sound))
        for key, value, high in (("fps", self.fps, 1000.0), ("fps-in", self.fps_in, 1000.0)):
            if not (math.isfinite(value) and 0.001 <= value <= high):
                raise ConfigError(f"--{key} {value:g} is not between 0.001 and {high:g} per second.")
        if not 0 < self.threshold < 1:
            raise ConfigError(f"--threshold {self.threshold:g} is not between 0 and 1.")
        for name, choice, known in (("between", self.between, BETWEEN), ("masks", self.masks, MASK_FORMS)):
            if choice not in known:
                raise ConfigError(f"--{name} {choice} is not one of {', '.join(known)}.")


def as_stored(options: Options, video: Path, model: Mapping[str, str]) -> dict[str, Any]:
    """The options with what they are applied to, in the form in which they are stored and compared."""
    return {
        "video": _identity(video),
        **asdict(options),
        "sound": _identity(options.sound) if options.sound is not None else None,
        "model": dict(model),
    }


def _identity(path: Path) -> str:
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    status = [file.stat() for file in files]
    newest = max((s.st_mtime_ns for s in status), default=0)
    return f"{path.name}, {sum(s.st_size for s in status)} bytes, {newest / 1e9:.6f}"
