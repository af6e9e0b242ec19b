"""Progress on the screen: bars on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from mibench import progress

INTERVAL = 15.0
"""Seconds between two lines of one task where there is no terminal."""


@contextmanager
def shown(console: Console) -> Iterator[None]:
    """Shows the progress of a block on ``console``, in the form that suits it."""
    if not console.is_terminal:
        with progress.shown_by(Lines(console.print)):
            yield
        return
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        refresh_per_second=4,
    )
    with bars, progress.shown_by(Bars(bars)):
        yield


class Bars:
    """Bars that vanish when their work is done; notes stay above them."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._noted: set[str] = set()

    def start(self, title: str, total: int) -> Bar:
        """Opens a bar."""
        return Bar(self._bars, self._bars.add_task(title, total=total, figures=""))

    def finish(self, task: progress.Task) -> None:
        """Removes the bar."""
        assert isinstance(task, Bar)
        self._bars.remove_task(task.id)

    def note(self, text: str) -> None:
        """Prints a line that stays, each only once."""
        if text in self._noted:
            return
        self._noted.add(text)
        self._bars.console.print(text, soft_wrap=True)


class Bar:
    """One task of `Bars`."""

    def __init__(self, bars: Progress, task: TaskID) -> None:
        self._bars = bars
        self.id = task

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Moves the bar."""
        if figures:
            self._bars.update(self.id, advance=steps, figures=_spelled(figures))
        else:
            self._bars.update(self.id, advance=steps)


class Lines:
    """Plain lines for logs: every `INTERVAL` seconds one, and one when a long task ends."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._noted: set[str] = set()

    def start(self, title: str, total: int) -> Line:
        """Begins to watch a task; a short one is never mentioned."""
        return Line(self._write, title, total)

    def finish(self, task: progress.Task) -> None:
        """Says how long it took."""
        assert isinstance(task, Line)
        task.close()

    def note(self, text: str) -> None:
        """Prints a line, each only once."""
        if text not in self._noted:
            self._noted.add(text)
            self._write(text)


class Line:
    """One task of `Lines`."""

    def __init__(self, write: Callable[[str], None], title: str, total: int) -> None:
        self._write = write
        self._title = title
        self._total = total
        self._done = 0
        self._resumed = 0
        self._began = self._said = time.monotonic()

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Counts, and writes a line when one is due."""
        if self._done == 0 and steps > 1 and not figures:
            self._resumed = steps  # done by an interrupted run: says nothing about the speed
        self._done += steps
        now = time.monotonic()
        if now - self._said < INTERVAL:
            return
        self._said = now
        spent, fresh = now - self._began, max(self._done - self._resumed, 1)
        left = spent / fresh * max(self._total - self._done, 0)
        parts = [
            f"{self._title}: {self._done}/{self._total}",
            _spelled(figures),
            f"{_clock(spent)} elapsed",
            f"{_clock(left)} left",
        ]
        self._write(", ".join(part for part in parts if part))

    def close(self) -> None:
        """Writes the last line, if the task was long enough to be mentioned before."""
        if self._said != self._began and self._done >= self._total:
            self._write(f"{self._title}: done in {_clock(time.monotonic() - self._began)}")


def _spelled(figures: dict[str, float]) -> str:
    return " ".join(f"{name} {value:.3g}" for name, value in figures.items())


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
