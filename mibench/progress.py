"""Progress of long work, reported to whoever shows it; silent when nobody does.

Methods open a `task` and call its ``advance``; the command line installs a display with `shown_by`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Task(Protocol):
    """One running piece of work with a known number of steps."""

    def advance(self, steps: int = 1, **figures: float) -> None:
        """Reports ``steps`` more done, with figures to show beside the bar, such as a loss."""


class Display(Protocol):
    """Something that can show tasks and notes."""

    def start(self, title: str, total: int) -> Task:
        """Opens a bar of ``total`` steps."""

    def finish(self, task: Task) -> None:
        """Closes the bar of ``task``."""

    def note(self, text: str) -> None:
        """Shows one line that stays."""


class _Silent:
    def start(self, title: str, total: int) -> Task:  # noqa: ARG002
        return self

    def finish(self, task: Task) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def advance(self, steps: int = 1, **figures: float) -> None:
        pass


_display: Display = _Silent()


@contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """Shows all tasks of a block on ``display``."""
    global _display
    before, _display = _display, display
    try:
        yield
    finally:
        _display = before


@contextmanager
def task(title: str, total: int) -> Iterator[Task]:
    """Opens a task of ``total`` steps for the length of a block."""
    display = _display
    running = display.start(title, total)
    try:
        yield running
    finally:
        display.finish(running)


def note(text: str) -> None:
    """Tells the user one thing that stays on the screen, such as what was reused."""
    _display.note(text)
