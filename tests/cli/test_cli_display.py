import io

import pytest
from rich.console import Console

from mibench import progress
from mibench.cli import display


def shown_on(terminal, work):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=100, markup=False, highlight=False)
    with display.shown(console):
        work()
    return file.getvalue()


def some_work():
    progress.note("reused [something]")
    with progress.task("Training", total=4) as task:
        for _ in range(4):
            task.advance(loss=0.5)
    progress.note("reused [something]")


def test_elsewhere_notes_stay_and_short_tasks_are_silent():
    assert shown_on(terminal=False, work=some_work) == "reused [something]\n"


def test_elsewhere_a_long_task_writes_lines(monkeypatch):
    monkeypatch.setattr(display, "INTERVAL", 0.0)
    lines = shown_on(terminal=False, work=some_work).splitlines()
    assert lines[1] == "Training: 1/4, loss 0.5, 0:00 elapsed, 0:00 left"
    assert lines[-1] == "Training: done in 0:00"


def test_elsewhere_a_task_that_fails_is_not_called_done(monkeypatch):
    monkeypatch.setattr(display, "INTERVAL", 0.0)

    def failing():
        with progress.task("Training", total=4) as task:
            task.advance()
            raise ValueError

    file = io.StringIO()
    with pytest.raises(ValueError), display.shown(Console(file=file)):  # noqa: PT011
        failing()
    assert "done" not in file.getvalue()


def test_on_a_terminal_bars_show_figures_and_notes_stay():
    text = shown_on(terminal=True, work=some_work)
    assert text.count("reused [something]") == 1


def test_the_time_left_does_not_count_resumed_steps(monkeypatch):
    monkeypatch.setattr(display, "INTERVAL", 0.0)
    clock = iter([0.0, 0.0, 10.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    lines = []
    line = display.Line(lines.append, "Training", 100)
    line.advance(80)
    line.advance(10, loss=1.0)
    assert lines[-1] == "Training: 90/100, loss 1, 0:10 elapsed, 0:10 left"


def test_nobody_shows_anything_afterwards():
    shown_on(terminal=False, work=some_work)
    some_work()  # silent, and no error
