"""What of a grid is done, runs, waits or has failed, and what is started next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from filelock import FileLock, Timeout

from mibench.errors import RecordError, StorageError
from mibench.files import ensure_writable, storage_error
from mibench.record import read_record
from mibench.sweep.grid import Cell
from mibench.sweep.local import Executor

LOGS = "logs"
"""Folder of what the runs print, beside their results."""
LOCK = ".sweep.lock"
POLL = 0.5
"""Seconds between two looks at what runs."""


class State(StrEnum):
    """Where a run stands. ``kept``: an earlier sweep has finished it."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    KEPT = "kept"
    FAILED = "failed"


@dataclass
class Run:
    """One run of the sweep and how far it has come.

    Attributes:
        cell: what to run.
        folder: of its results.
        log: what it prints.
        estimate: minutes that it takes if nothing is in the cache; None where nobody knows.
        state: where it stands.
        began: when it was started, on the monotonic clock.
        seconds: that it took.
        reason: why it failed.
    """

    cell: Cell
    folder: Path
    log: Path
    estimate: float | None
    state: State = State.WAITING
    began: float | None = None
    seconds: float | None = None
    reason: str | None = None


@dataclass
class Sweep:
    """The runs of a grid, in order.

    Attributes:
        runs: all of them.
        executor: what carries them out.
        common: words that every run gets besides its own, such as the data root.
    """

    runs: Sequence[Run]
    executor: Executor
    common: Sequence[str] = field(default_factory=tuple)

    def carry_out(self, show: Callable[[Sequence[Run]], None]) -> None:
        """Makes every run that is not done; one that fails stops no other.

        A run that was killed goes on from what it had trained. Runs that are cancelled, by Ctrl-C
        or an error, go back to waiting.

        Args:
            show: called after every change, and now and then between.

        Raises:
            StorageError: a log cannot be written.
        """
        for run in self.runs:
            if run.state is State.WAITING and is_finished(run.folder):
                run.state = State.KEPT
        try:
            while True:
                self._start()
                show(self.runs)
                if not any(run.state is State.RUNNING for run in self.runs):
                    return
                time.sleep(POLL)
                self._collect()
        finally:
            self.executor.cancel()
            for run in self.runs:
                if run.state is State.RUNNING:
                    run.state = State.WAITING

    def _start(self) -> None:
        while self.executor.free > 0 and (run := self._next()) is not None:
            words = [*run.cell.words(), *self.common, "--out", str(run.folder)]
            self.executor.submit(run.cell.key, words, run.log)
            run.state, run.began = State.RUNNING, time.monotonic()

    def _next(self) -> Run | None:
        """The first that waits; one that would only wait for another's training comes later."""
        waiting = [run for run in self.runs if run.state is State.WAITING]
        training = {run.cell.trains for run in self.runs if run.state is State.RUNNING}
        apart = [run for run in waiting if run.cell.trains not in training]
        return next(iter([*apart, *waiting]), None)

    def _collect(self) -> None:
        ended = self.executor.finished()
        for run in self.runs:
            if run.cell.key not in ended or run.state is not State.RUNNING:
                continue
            assert run.began is not None, "a run that runs has begun"
            run.seconds = time.monotonic() - run.began
            if ended[run.cell.key] == 0 and is_finished(run.folder):
                run.state = State.DONE
                continue
            run.state = State.FAILED
            run.reason = last_words(run.log) or f"exit status {ended[run.cell.key]}"


def planned(cells: Sequence[Cell], out: Path) -> list[Run]:
    """Returns the runs of a grid, each with a folder below ``out``."""
    from mibench.cli.run import estimate_minutes

    return [
        Run(
            cell=cell,
            folder=out / cell.key,
            log=out / LOGS / f"{cell.key.replace('/', '--')}.log",
            estimate=estimate_minutes(cell.job.protocol, cell.job.defense, cell.job.attack),
        )
        for cell in cells
    ]


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keeps other sweeps out of a folder: they would make the same runs and overwrite their logs.

    The system frees the folder when the process dies.

    Raises:
        StorageError: another sweep writes into the folder, or it cannot be written.
    """
    ensure_writable(out)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise StorageError(
            f"another sweep writes into {out}: give this one another --out, or that one more "
            "--workers"
        ) from error
    except OSError as error:
        raise storage_error("lock", out, error) from error
    try:
        yield
    finally:
        lock.release()


def is_finished(folder: Path) -> bool:
    """Says whether a folder holds the record of a run that succeeded."""
    try:
        return read_record(folder).status == "success"
    except RecordError:
        return False


def last_words(log: Path) -> str:
    """Returns the last line that a run has printed, without its ``error:``."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1].removeprefix("error: ").strip() if lines else ""


def minutes_left(runs: Sequence[Run], workers: int) -> float | None:
    """Returns about how many minutes the rest takes; None where nobody has measured a run.

    Estimates are corrected by what the finished runs took; a part of each is shared and in the
    cache by then.
    """
    rest = [run for run in runs if run.state in (State.WAITING, State.RUNNING)]
    if any(run.estimate is None for run in rest):
        return None
    known = [
        (run.seconds / 60, run.estimate)
        for run in runs
        if run.state is State.DONE and run.seconds is not None and run.estimate
    ]
    pace = sum(took for took, _ in known) / sum(thought for _, thought in known) if known else 1.0
    left = 0.0
    for run in rest:
        whole = pace * (run.estimate or 0.0)
        gone = 0.0 if run.began is None else (time.monotonic() - run.began) / 60
        left += max(0.0, whole - gone) if run.state is State.RUNNING else whole
    return left / workers
