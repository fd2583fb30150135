"""Where the numbers of a run are shown while it trains: TensorBoard, or a service of the user's choice.

`process.logger` names it. wandb and trackio share one interface (`init`, `log`, `Image`, `finish`) and are imported
only where they are asked for. metrics.csv is written in any case.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from scripts.engine.plots import read_rows
from utils.errors import ConfigError
from utils.files import write_atomically
from utils.optional import import_optional

PROJECT = "modat"
PICTURES = ("", "_extremes", "_classes", "_experts", "_attention")
"""Ends of the names of a test's pictures."""
ID_FILE = "tracker_run.txt"
"""In a run's folder: the name of the run at the service, so that a resumed run goes on with it."""


class Tracker(Protocol):
    """A display of numbers and pictures by optimizer step."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Add numbers; names have their group before a slash."""

    def image(self, name: str, path: Path, step: int) -> None:
        """Add a PNG."""

    def flush(self) -> None:
        """Write what is pending."""

    def close(self) -> None:
        """End the run."""


class TensorBoard:
    """Event files in a folder.

    Args:
        folder: of the event files.
        purge_step: first step whose earlier rows TensorBoard hides, after a resume; None for a new run.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, name: str, path: Path, step: int) -> None:
        """See Tracker."""
        with Image.open(path) as image:
            self._writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def flush(self) -> None:
        """See Tracker."""
        self._writer.flush()

    def close(self) -> None:
        """See Tracker."""
        self._writer.close()


class Service:
    """wandb or trackio: a run of the project 'modat'.

    Args:
        name: the package.
        folder: of the run; its name is shown.
        config: the whole config, as plain values.
        resume: go on with the run that the folder names, if it names one.

    Raises:
        ConfigError: the package is not installed, or refuses the run.
    """

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any], *, resume: bool) -> None:
        self._package = import_logger(name)
        file = folder / ID_FILE
        known = file.read_text().strip() if resume and file.is_file() else ""
        run = known or uuid.uuid4().hex[:8]
        options: dict[str, Any] = {"project": PROJECT, "config": dict(config), "resume": "allow"}
        if name == "wandb":
            options |= {"name": folder.name, "id": run, "dir": str(folder)}
        else:  # trackio knows a run by its name
            options["name"] = f"{folder.name}-{run}"
        try:
            self._package.init(**options)
        except Exception as error:  # services fail in ways of their own: no login, no network, no space
            raise ConfigError(
                f"process.logger={name!r}: {name}.init failed ({type(error).__name__}: {error}); "
                "set it up as its manual says, or take process.logger=tensorboard."
            ) from error
        write_atomically(file, lambda stream: stream.write(f"{run}\n".encode()))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See Tracker."""
        self._package.log(dict(values), step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        """See Tracker."""
        self._package.log({name: self._package.Image(str(path))}, step=step)

    def flush(self) -> None:
        """See Tracker; services send by themselves."""

    def close(self) -> None:
        """See Tracker."""
        self._package.finish()


def import_logger(name: str) -> Any:
    """The package behind `process.logger`; None for TensorBoard.

    Raises:
        ConfigError: it is not installed.
    """
    return None if name == "tensorboard" else import_optional(name, f"process.logger={name!r}")


def open_tracker(
    name: str, folder: Path, config: Mapping[str, Any], *, resume: bool, purge_step: int | None = None
) -> Tracker:
    """The display that `process.logger` names.

    Args:
        name: 'tensorboard', 'wandb' or 'trackio'.
        folder: of the run.
        config: see Service.
        resume: the run goes on.
        purge_step: see TensorBoard.
    """
    if name == "tensorboard":
        return TensorBoard(folder / "tensorboard", purge_step)
    return Service(name, folder, config, resume=resume)


def show_in_tensorboard(folder: Path, title: str) -> None:
    """Add the pictures of a test to a run's TensorBoard, at the last step of its log; nothing where it has none.

    Args:
        folder: of the run.
        title: of the test: the pictures are `images/{title}.png` and `images/{title}_*.png`.
    """
    if not (folder / "tensorboard").is_dir():
        return
    log = folder / "metrics.csv"
    steps = [row["step"] for row in read_rows(log) if "step" in row] if log.is_file() else []
    board = TensorBoard(folder / "tensorboard")
    for kind in PICTURES:
        path = folder / "images" / f"{title}{kind}.png"
        if path.is_file():
            board.image(f"{title}/{kind.removeprefix('_') or 'clips'}", path, int(max(steps, default=0)))
    board.close()
