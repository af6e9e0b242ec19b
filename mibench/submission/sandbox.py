"""Runs a command of mibench on submitted code where that can do no harm.

The child may write in one folder, and reads Python, mibench, the submission and the images. It has
no network, starts no programs, and sees none of the environment. What it leaves behind was made by
foreign code: links are refused, and every number is computed again by whoever believes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mibench.checks.base import one_line
from mibench.checks.confine import Limits
from mibench.checks.process import environment, of_python, resident_bytes
from mibench.errors import SubmissionError

GIB = 2**30
LIMITS = Limits(
    seconds=12 * 3600.0,
    cpu_seconds=24 * 3600,
    memory_bytes=12 * GIB,
    output_bytes=8 * 2**20,
    file_bytes=2 * GIB,
    files=1024,
)
"""What a whole run may use: time of the clock and of the processor, memory, what it prints."""
FOLDER_BYTES = 6 * GIB
"""What may lie in its folder, decoded images included."""
MOST_FILES = 200_000
GLANCE = 0.2
"""Seconds between two looks at the child."""
WEIGH = 2.0
"""Seconds between two looks at its folder."""
LINES = 12
"""Last lines of what it printed that are kept."""


@dataclass
class Done:
    """How a command in the sandbox ended.

    Attributes:
        status: its exit status; None where it was stopped.
        stopped: why it was stopped.
        printed: the last lines that it printed, standard output and errors together.
        confined: what was in force; see `walls`.
        refused: what the submitted code tried beyond its limits.
    """

    status: int | None = None
    stopped: str | None = None
    printed: list[str] = field(default_factory=list)
    confined: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def refuse_failure(self, what: str, *, fine: Sequence[int] = (0,)) -> None:
        """Raises what went wrong, if anything did.

        Args:
            what: was done, for the message.
            fine: exit statuses that are no failure.

        Raises:
            SubmissionError: it was stopped, failed, or tried what no component may.
        """
        lines = [f"{what}: the submitted code tried {one}" for one in self.refused]
        if self.stopped is not None:
            lines.append(f"{what} was stopped: {self.stopped}")
        elif self.status not in fine:
            last = next((one for one in reversed(self.printed) if one), "it printed nothing")
            lines.append(f"{what} failed: {one_line(last.removeprefix('error: '))}")
        if lines:
            raise SubmissionError(lines)


def carry_out(
    words: Sequence[str],
    folder: Path,
    code: Path,
    *,
    readable: Iterable[Path] = (),
    limits: Limits = LIMITS,
    folder_bytes: int = FOLDER_BYTES,
    say: Callable[[str], None] = lambda _: None,
) -> Done:
    """Runs ``mibench`` with these words in a confined process, from the folder above ``code``'s.

    Args:
        words: of the command.
        folder: the only one that it may write in; it is there.
        code: the submission's folder.
        readable: what else it may read, such as the images.
        limits: what it may use.
        folder_bytes: what may lie in the folder in the end.
        say: told each line that it prints.
    """
    folder, code = folder.resolve(), code.resolve()
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    told_read, told_write = os.pipe()
    orders = {
        "words": list(words),
        "folder": str(folder),
        "code": str(code),
        "readable": [
            str(one) for one in (*of_python(), code, *(one.resolve() for one in readable))
        ],
        "limits": limits.described(),
        "told": told_write,
    }
    # What libraries leave behind goes with the cache.
    own = ("MIBENCH_CACHE", "XDG_CACHE_HOME", "HOME", "TMPDIR")
    env = {**environment(folder), **dict.fromkeys(own, str(cache)), **_torch_home(orders)}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "mibench.submission.inside"],
        pass_fds=[told_write],
        cwd=code.parents[1],
        env=env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    os.close(told_write)
    assert process.stdin is not None, "asked for a pipe"
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(json.dumps(orders).encode())
        process.stdin.close()
    watcher = _Watcher(process, told_read, folder, limits, folder_bytes, say)
    try:
        watcher.watch()
    finally:
        _end(process)
        os.close(told_read)
    links = _links(folder)
    if links:
        watcher.done.refused.append(f"to leave a link behind: {links[0]}")
        for one in links:
            (folder / one).unlink()
    return watcher.done


def _torch_home(orders: dict[str, Any]) -> dict[str, str]:
    """Where published weights of metrics lie, if they are there, so that they can be read."""
    import torch

    place = Path(torch.hub.get_dir())
    if not (place / "checkpoints").is_dir():
        return {}
    orders["readable"].append(str(place.resolve()))
    return {"TORCH_HOME": str(place.parent)}


class _Watcher:
    """Reads what a child says and stops it where it takes too much."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        told: int,
        folder: Path,
        limits: Limits,
        folder_bytes: int,
        say: Callable[[str], None],
    ) -> None:
        assert process.stdout is not None, "asked for a pipe"
        self.done = Done()
        self._process = process
        self._output, self._told = process.stdout.fileno(), told
        self._folder, self._limits, self._folder_bytes = folder, limits, folder_bytes
        self._say = say
        self._printed = 0
        self._rest, self._said = b"", b""

    def watch(self) -> None:
        began = weighed = time.monotonic()
        open_ = [self._output, self._told]
        while open_ and self.done.stopped is None:
            ready, _, _ = select.select(open_, [], [], GLANCE)
            for one in ready:
                data = os.read(one, 2**16)
                if not data:
                    open_.remove(one)
                elif one == self._output:
                    self._print(data)
                else:
                    self._tell(data)
            now = time.monotonic()
            if now - weighed > WEIGH:
                weighed = now
                self._weigh()
            self._judge(now - began)
        if self.done.stopped is None:
            self._finish(began)

    def _finish(self, began: float) -> None:
        """The output is closed: the child has ended, or waits for nobody to see it."""
        left = max(1.0, self._limits.seconds - (time.monotonic() - began))
        try:
            status = self._process.wait(left)
        except subprocess.TimeoutExpired:
            self.done.stopped = self._late()
            return
        if self._rest:
            self._print(b"\n")
        self._weigh()
        if status < 0 and self.done.stopped is None:
            name = signal.Signals(-status).name
            self.done.stopped = {
                "SIGXCPU": f"it took more than {self._limits.cpu_seconds} s of processor time",
                "SIGXFSZ": f"it wrote a file of more than {self._limits.file_bytes} bytes",
            }.get(name, f"its process ended by signal {name}")
        self.done.status = status

    def _late(self) -> str:
        return f"it took more than {self._limits.seconds:.0f} s"

    def _judge(self, seconds: float) -> None:
        limits = self._limits
        if seconds > limits.seconds:
            self.done.stopped = self._late()
        elif self._printed > limits.output_bytes:
            self.done.stopped = f"it printed more than {limits.output_bytes} bytes"
        elif (resident_bytes(self._process.pid) or 0) > limits.memory_bytes:
            self.done.stopped = f"it took more than {limits.memory_bytes} bytes of memory"

    def _weigh(self) -> None:
        total, count = _hidden_bytes(self._process.pid, self._folder), 0
        for root, _, names in os.walk(self._folder):
            count += len(names)
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(root, name)).st_size  # noqa: PTH118 - quick
        if total > self._folder_bytes:
            self.done.stopped = f"it left more than {self._folder_bytes} bytes in its folder"
        elif count > MOST_FILES:
            self.done.stopped = f"it left more than {MOST_FILES} files in its folder"

    def _print(self, data: bytes) -> None:
        self._printed += len(data)
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-(2**16) :]
        for line in lines:
            text = line.decode(errors="replace")
            self.done.printed = [*self.done.printed, one_line(text)][-LINES:]
            # Blanks stay, since tables need them; what steers a terminal does not.
            self._say("".join(c if c.isprintable() else " " for c in text).rstrip()[:300])

    def _tell(self, data: bytes) -> None:
        *lines, rest = (self._said + data).split(b"\n")
        self._said = rest[-(2**12) :]
        for line in lines:
            try:
                found = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if not isinstance(found, dict):
                continue
            # Only the first line was written before foreign code was there.
            if not self.done.confined and isinstance(found.get("confined"), dict):
                self.done.confined = found["confined"]
            elif isinstance(found.get("refused"), list) and len(self.done.refused) < LINES:
                text = one_line(": ".join(map(str, found["refused"])))
                if text not in self.done.refused:
                    self.done.refused.append(text)


def _hidden_bytes(pid: int, folder: Path) -> int:
    """Bytes of files below a folder that have no name any more, but are open or mapped."""
    found: dict[tuple[int, int], int] = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):  # noqa: PTH208 - a moment counts
            with contextlib.suppress(OSError):
                facts = os.stat(f"/proc/{pid}/fd/{name}")  # noqa: PTH116
                if stat.S_ISREG(facts.st_mode) and facts.st_nlink == 0:
                    found[facts.st_dev, facts.st_ino] = facts.st_size
    mapped: dict[str, int] = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            parts = line.split(None, 5)
            if len(parts) == 6 and parts[5].endswith(" (deleted)"):
                inside = parts[5].startswith(f"{folder}{os.sep}")
                low, high = (int(end, 16) for end in parts[0].split("-"))
                end = int(parts[2], 16) + high - low
                if inside and not any(str(inode) == parts[4] for _, inode in found):
                    mapped[parts[4]] = max(mapped.get(parts[4], 0), end)
    return sum(found.values()) + sum(mapped.values())


def _end(process: subprocess.Popen[bytes]) -> None:
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None, "asked for a pipe"
    process.stdout.close()


def _links(folder: Path) -> list[str]:
    """Everything below a folder that is neither a plain file nor a folder."""
    found = []
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                found.append(path.relative_to(folder).as_posix())
    return sorted(found)


def drop_cache(folder: Path) -> None:
    """Deletes the cache of a command that is done."""
    shutil.rmtree(folder / "cache", ignore_errors=True)


def walls(confined: Mapping[str, Any]) -> str:
    """Says in words what submitted code was kept from, and what it was not."""
    named = {
        "files": "writing outside the folder of its results and reading the user's files",
        "network": "the network",
        "processes": "starting programs and touching other processes",
    }
    held = [words for name, words in named.items() if confined.get(name)]
    open_ = [words for name, words in named.items() if not confined.get(name)]
    said = (
        f"the kernel kept it from {', '.join(held)}" if held else "the kernel kept it from nothing"
    )
    if confined.get("namespaces"):
        said += "; it had a network namespace of its own without interfaces"
    if open_:
        said += (
            f"; NOT isolated here: {', '.join(open_)} (Python code is watched, which hostile code "
            "gets round)"
        )
    if missing := confined.get("missing"):
        said += f"; limits that this system lacks: {', '.join(map(str, missing))}"
    return (
        f"{said}; not isolated anywhere: processor caches, and what it reads of images and Python"
    )
