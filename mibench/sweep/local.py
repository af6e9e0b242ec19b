"""Carries out the runs of a sweep as processes of this machine."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from mibench.files import ensure_writable, storage_error

GRACE = 10.0
"""Seconds that an interrupted run has to end by itself."""


class Executor(Protocol):
    """What carries out runs: this machine, or a cluster."""

    @property
    def free(self) -> int:
        """How many runs can be started now."""

    def submit(self, key: str, words: Sequence[str], log: Path) -> None:
        """Starts ``mibench run`` with these words; all that it prints goes into ``log``."""

    def finished(self) -> Mapping[str, int]:
        """Returns the exit status of each run that has ended since the last call."""

    def cancel(self) -> None:
        """Ends all that runs; what it has trained is kept."""


class LocalExecutor:
    """Runs so many processes at a time.

    Args:
        workers: processes at a time.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def free(self) -> int:
        """Workers that have nothing to do."""
        return self._workers - len(self._running)

    def submit(self, key: str, words: Sequence[str], log: Path) -> None:
        """Starts a run in a process of its own.

        Raises:
            StorageError: the log cannot be written.
        """
        ensure_writable(log.parent)
        try:
            file = log.open("wb")
        except OSError as error:
            raise storage_error("write", log, error) from error
        with file:
            self._running[key] = subprocess.Popen(  # noqa: S603 - our own command, no shell
                [sys.executable, "-m", "mibench.cli", "run", *words],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                # Ctrl-C goes to the sweep alone, which then ends its runs in order.
                start_new_session=True,
            )

    def finished(self) -> dict[str, int]:
        """Returns the exit status of each run that has ended since the last call."""
        ended = {key: one.poll() for key, one in self._running.items()}
        found = {key: status for key, status in ended.items() if status is not None}
        for key in found:
            del self._running[key]
        return found

    def cancel(self) -> None:
        """Interrupts all runs as Ctrl-C would, and kills what does not end."""
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + GRACE
        for process in self._running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._running.clear()
