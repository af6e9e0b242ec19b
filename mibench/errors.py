"""Problems that a user can mend. The command line prints them as one line and exits with code 2.

Every message says what was wrong, where, and what to do. A bug of ours is any other exception.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class MibenchError(Exception):
    """Base of all errors that bad input or a missing resource can cause."""


class UnknownNameError(MibenchError):
    """A name that no registry, protocol or key list holds; the message names near misses."""


class InvalidParamsError(MibenchError):
    """A parameter or protocol key that is unknown, of the wrong type or out of range."""


class DivergedError(MibenchError):
    """A training whose loss became infinite or not a number, or whose features became constant."""


class NotApplicableError(MibenchError):
    """An attack that does not apply to a defense; a suite goes on without it."""


class PluginError(MibenchError):
    """A plugin file that cannot be imported, or a class that does not fulfil its contract."""


class DataError(MibenchError):
    """Images that are missing, unreadable or not of the declared size and layout."""


class SharedImagesError(DataError):
    """Roles of a protocol that hold the same pictures."""


class StorageError(MibenchError):
    """A folder that cannot be written, or a disk that is full."""


class DeviceError(MibenchError):
    """A device that was asked for and is not there."""


class ThreatModelError(MibenchError):
    """An attack that reached for something its adversary was not granted."""


class RecordError(MibenchError):
    """A record that cannot be read: broken, or written by a newer format."""


class BoardError(MibenchError):
    """A leaderboard that holds what does not belong there, or pages that do not follow from it."""


class UnavailableError(MibenchError):
    """Something that had to be downloaded and cannot be had here; the message says what to do."""


class SubmissionError(MibenchError):
    """A submission that is refused; ``lines`` holds everything that is wrong, a line each."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


@contextmanager
def blaming(component: type, method: str) -> Iterator[None]:
    """Turns an exception inside a plugin's method into one line that names the plugin.

    Exceptions of built-in components pass: those are our own bugs and deserve their traceback.
    """
    try:
        yield
    except MibenchError:
        raise
    except Exception as error:
        if component.__module__.startswith("mibench."):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        file = getattr(sys.modules.get(component.__module__), "__file__", None)
        frame = next((one for one in reversed(frames) if one.filename == file), frames[-1])
        raise PluginError(
            f"{component.__name__}.{method}() raised {type(error).__name__}: {error} "
            f"({frame.filename}, line {frame.lineno})"
        ) from error
