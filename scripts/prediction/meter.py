"""Progress of a prediction: a bar with the time left on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from scripts.engine.progress import SECONDS_BETWEEN_LINES, clock

Report = Callable[[float], None]
"""Receives the time of the video that is done, seconds."""


class Meter:
    """Shows the passes over one video; a context manager.

    Args:
        name: of the video.
        console: None shows nothing.
    """

    def __init__(self, name: str, console: Console | None) -> None:
        self.name = name
        self.console = console
        self._bar: Progress | None = None

    def __enter__(self) -> "Meter":
        """Start the bar, where there is a terminal."""
        if self.console is not None and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self.console)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()

    def begin(self, what: str, duration: float | None) -> Report:
        """Begin a pass over `duration` seconds of video; None: unknown."""
        if self.console is None:
            return lambda done: None
        title = f"{self.name}: {what}"
        if self._bar is not None:
            bar, task = self._bar, self._bar.add_task(title, total=duration, text="")
            return lambda done: bar.update(task, completed=done, text=_text(done, duration))
        return _Lines(self.console, title, duration)


class _Lines:
    def __init__(self, console: Console, title: str, duration: float | None) -> None:
        self.console, self.title, self.duration = console, title, duration
        self.start = time.monotonic()
        self.due = self.start + SECONDS_BETWEEN_LINES

    def __call__(self, done: float) -> None:
        now = time.monotonic()
        if now < self.due or done <= 0:
            return
        self.due = now + SECONDS_BETWEEN_LINES
        left = ""
        if self.duration is not None:
            left = f", {clock(max(0.0, self.duration - done) * (now - self.start) / done)} left"
        self.console.print(f"{self.title}, {_text(done, self.duration)}{left}")


def _text(done: float, duration: float | None) -> str:
    return f"{done:.0f} s" if duration is None else f"{done:.0f} of {duration:.0f} s"
