"""Progress of long work: a live bar on a terminal, and plain lines with speed and time left elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn


def format_seconds(seconds: float) -> str:
    """1:02:03, or 2:03 if less than an hour."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def part_of(progress: Callable[[int, int], None] | None, part: int, parts: int) -> Callable[[int, int], None] | None:
    """A callback for the progress of one of several equal parts, which reports to `progress`; None if that is None.

    Args:
      progress: called with (steps done, steps in all parts).
      part: index of the part, from 0.
      parts: number of parts.
    """
    return progress and (lambda done, steps: progress(part * steps + done, parts * steps))


class ProgressBar:
    """Counts towards a total, as a context manager.

    Args:
      description: of the work, such as "training".
      total: the count at the end.
      start: the count at the start.
      interval: seconds between plain lines; None: a line at every `report`.
      enabled: False to show nothing (on all processes but the first).
    """

    def __init__(
        self, description: str, total: int, start: int = 0, interval: float | None = 10.0, enabled: bool = True
    ):
        self.description, self.total, self.done, self.start = description, total, start, start
        self._interval, self._enabled = interval, enabled
        self._began = self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # time and count of the first update: compiling may precede it
        self._live: Progress | None = None
        if enabled and sys.stderr.isatty():
            self._live = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
                redirect_stdout=False,
            )

    @property
    def is_live(self) -> bool:
        """Whether this is a live bar on a terminal."""
        return self._live is not None

    def __enter__(self) -> "ProgressBar":
        if self._live:
            self._live.start()
            self._task = self._live.add_task(self.description, total=self.total, completed=self.start, text="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        """Shows the progress; plain output gets a line only every `interval` seconds and at the end."""
        self.done, self.total = done, self.total if total is None else total
        self._first = self._first or (time.monotonic(), done)
        if self._live:
            self._live.update(self._task, completed=done, total=self.total, text=text)
        elif self._enabled and self._interval is not None:
            now = time.monotonic()
            if now - self._last_line >= self._interval or (done == self.total and self._last_line > self._began):
                self._last_line = now
                self._print(text)

    def report(self, text: str) -> None:
        """Shows a text with the progress; plain output always gets a line."""
        if self._live:
            self._live.update(self._task, completed=self.done, text=text)
        elif self._enabled:
            self._print(text)

    def _print(self, text: str) -> None:
        began, start = self._first or (self._began, self.start)  # the first step itself is not representative
        elapsed, done = time.monotonic() - began, self.done - start
        left = f", {format_seconds(elapsed / done * (self.total - self.done))} left" if done else ""
        parts = [f"{self.description} {self.done}/{self.total}", text]
        print("  ".join(part for part in parts if part) + left, file=sys.stderr, flush=True)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Hides this bar while other work shows its own."""
        if self._live:
            self._live.stop()
        try:
            yield
        finally:
            if self._live:
                self._live.start()
