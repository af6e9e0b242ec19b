"""The trusted side of a component's process: starts it, asks it, stops it, says how it failed.

The parent never imports a component. It hands out tensors and gets tensors back, counts the bytes,
and makes every verdict itself. A component that breaks a limit ends the check with a `Finding`,
never with a traceback or a hang.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import secrets
import select
import shutil
import signal
import site
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

import mibench
from mibench.checks import wire
from mibench.checks.base import Finding, Verdict, one_line
from mibench.checks.confine import Limits
from mibench.errors import MibenchError
from mibench.files import Json

START_SECONDS = 120.0
"""Time that importing PyTorch may take."""
GLANCE = 0.05
"""Seconds between two looks at a child's memory."""
KEPT_OUTPUT = 2000
"""Characters of a component's output that a finding quotes."""
FACTS = ("/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/sys/vm", "/sys/devices")
SETTINGS = tuple(
    f"/etc/{name}"
    for name in ("alternatives", "group", "ld.so.cache", "localtime", "nsswitch.conf", "passwd")
)
SYSTEM = ("/usr", "/lib", "/lib64", "/dev/urandom", *FACTS, *SETTINGS)
"""What a child may read of the system: libraries, names of users, the time zone, facts of the
machine. Not other settings, and nothing of other processes, whose environment may hold secrets."""

ADVICE = {
    "limit-time": "end every call within seconds; a check trains for tens of steps only",
    "limit-memory": "hold less at once; work in batches",
    "limit-output": "print nothing; the benchmark shows progress itself",
    "limit-exit": "never end the interpreter; raise an exception instead",
    "limit-files": "write nowhere; what is learned belongs into parameters and buffers",
    "limit-network": "use no network; a component is its file and its weights",
    "limit-process": "start no process and send no signal",
    "limit-reply": "leave the files that are open already alone",
    "raises": "make it run; the message names the line",
}
TRIED = {
    "limit-time": "ran the component with a limit of time",
    "limit-memory": "ran the component with a limit of memory",
    "limit-output": "counted what the component prints",
    "limit-exit": "watched whether the component's process goes on",
    "limit-files": "watched what the component writes",
    "limit-network": "watched whether the component opens connections",
    "limit-process": "watched whether the component starts processes",
    "limit-reply": "read the replies of the component's process",
    "raises": "called the component",
}
LIMIT_CHECKS = tuple(name for name in TRIED if name.startswith("limit-"))
"""Names of the checks that every component of any kind goes through."""


class ComponentError(Exception):
    """A component that broke a limit or raised, as a finding.

    Attributes:
        finding: what to show.
    """

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"{finding.check}: {finding.found}")
        self.finding = finding


def failure(check: str, found: str) -> Finding:
    """Returns the finding of a broken limit."""
    return Finding(check, Verdict.FAILED, TRIED[check], found, ADVICE[check])


def kept_within(found: Sequence[Finding], only: Sequence[str] | None) -> list[Finding]:
    """Returns a finding for each limit that was not broken.

    Args:
        found: what the checks have told.
        only: names of the checks that were asked for; all of them if None.
    """
    broken = {one.check for one in found}
    return [
        Finding(limit, Verdict.PASSED, TRIED[limit], "it kept within its limits")
        for limit in LIMIT_CHECKS
        if limit not in broken and (only is None or limit in only)
    ]


class Nursery:
    """One process that has imported PyTorch and forks the processes of components.

    Use as a context manager; leaving it ends all children. What is in force in the child that was
    started last is in ``confined``; see `isolation`.

    Args:
        preload: modules that are imported once for all children.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        self._control, theirs = socket.socketpair()
        self.folder = Path(tempfile.mkdtemp(prefix="mibench-check-"))
        self._children: list[Process] = []
        self._log = (self.folder / "nursery.txt").open("wb")
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this very interpreter
                [sys.executable, "-P", "-m", "mibench.checks.host", str(theirs.fileno()), *preload],
                pass_fds=[theirs.fileno()],
                env=environment(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )
        finally:
            theirs.close()
        self._ready = False
        self.confined: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends all children and the nursery, and deletes their folders."""
        for child in self._children:
            child.close()
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self, role: str, limits: Limits | None = None, readable: Iterable[Path] = ()
    ) -> Process:
        """Starts a confined process without a component.

        Args:
            role: what it is, for messages, such as ``client``.
            limits: what it may use.
            readable: folders that it may read beside Python's and the system's.
        """
        self._await()
        limits = limits or Limits()
        folder = self.folder / f"{role}-{secrets.token_hex(4)}"
        folder.mkdir()
        config: dict[str, Json] = {
            "folder": str(folder),
            "limits": limits.described(),
            "readable": [str(path) for path in (*of_python(), *readable)],
        }
        ours, theirs = socket.socketpair()
        output, printed = os.pipe()
        try:
            message = json.dumps(config).encode()
            socket.send_fds(self._control, [message], [theirs.fileno(), printed])
            number = int(self._line())
        finally:
            theirs.close()
            os.close(printed)
        child = Process(self, role, number, ours, output, folder, limits)
        self._children.append(child)
        child.begin()
        self.confined = child.confined
        return child

    def ended(self, number: int) -> int:
        """Waits for a child that was killed or has ended; returns its wait status."""
        self._control.sendall(json.dumps({"wait": number}).encode())
        return int(self._line())

    def _await(self) -> None:
        if self._ready:
            return
        self._control.settimeout(START_SECONDS)
        if self._line() != "ready":
            self._process.wait(5)
            self._log.flush()
            said = (self.folder / "nursery.txt").read_text(errors="replace")[-KEPT_OUTPUT:]
            raise RuntimeError(f"the process that checks run in did not start: {said}")
        self._ready = True

    def _line(self) -> str:
        found = bytearray()
        while not found.endswith(b"\n"):
            part = self._control.recv(1)
            if not part:
                break
            found += part
        return found.decode().strip()


class Process:
    """One confined process, as its parent sees it.

    Attributes:
        role: what it is, for messages.
        confined: what is in force there: ``files``, ``network`` and ``processes`` (bool), and
            ``missing``, limits that this system could not set.
        findings: what it tried beyond its limits so far, each once.
        received: bytes of tensors that came from it.
    """

    def __init__(
        self,
        nursery: Nursery,
        role: str,
        number: int,
        connection: socket.socket,
        output: int,
        folder: Path,
        limits: Limits,
    ) -> None:
        self.role = role
        self.limits = limits
        self.folder = folder
        self.confined: dict[str, Any] = {}
        self.findings: list[Finding] = []
        self.received = 0
        self._nursery = nursery
        self._number = number
        self._connection = connection
        self._output = output
        os.set_blocking(output, False)
        self._printed = bytearray()
        self._printed_bytes = 0
        self._base = 0
        self._broken: Finding | None = None
        self._open = True

    def begin(self) -> None:
        """Waits until the process has confined itself."""
        header, _ = self._receive(time.monotonic() + START_SECONDS)
        self.confined = header.get("ok", {})
        self._base = resident_bytes(self._number) or 0

    def ask(
        self,
        do: str,
        tensors: Mapping[str, Tensor] | None = None,
        /,
        *,
        seconds: float | None = None,
        **values: Json,
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Sends a request and waits for the answer.

        Args:
            do: name of the request, such as ``defense.protect``.
            tensors: sent with it.
            seconds: time allowed, if other than the limits'.
            values: the rest of the request.

        Returns:
            The JSON and the tensors of the answer. Both were made in the component's process.

        Raises:
            ComponentError: it broke a limit or raised. After a broken limit the process is gone,
                and every further request raises the same again.
            MibenchError: what was asked for cannot be had, such as a name that does not exist.
        """
        if self._broken is not None:
            raise ComponentError(self._broken)
        if self._unasked():
            # Or it would be taken for the answer to what is asked now.
            self._break("limit-reply", f"the {self.role} sent something that nobody asked for")
        deadline = time.monotonic() + (seconds or self.limits.seconds)
        try:
            self._connection.settimeout(max(deadline - time.monotonic(), 0.1))
            self._connection.sendall(wire.pack({"do": do, **values}, tensors or {}))
        except TimeoutError:
            self._break("limit-time", f"the {self.role} took no request within the time limit")
        except OSError:
            self._break_ended()
        header, found = self._receive(deadline)
        self.received += sum(one.numel() * one.element_size() for one in found.values())
        refused = self._noted(header.get("noted"))
        if "error" in header:
            raise self._error(header["error"], do, refused)
        ok = header.get("ok")
        if not isinstance(ok, dict):
            self._break("limit-reply", f"the {self.role} sent something that is no answer")
        assert isinstance(ok, dict)
        return ok, found

    def close(self) -> None:
        """Ends the process, whatever it does, and deletes its folder."""
        if self._open:
            self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    @property
    def alive(self) -> bool:
        """Whether it still answers."""
        return self._open

    def _unasked(self) -> bool:
        """Whether something lies on the connection while no request is open."""
        ready, _, _ = select.select([self._connection], [], [], 0)
        try:
            # Nothing at all means that the process has ended, which is told when it is asked.
            return bool(ready) and bool(self._connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    # --- reading ---------------------------------------------------------------------------------

    def _receive(self, deadline: float) -> tuple[dict[str, Any], dict[str, Tensor]]:
        def read(count: int) -> bytes:
            found = bytearray()
            while len(found) < count:
                if not self._wait(deadline):
                    continue
                try:
                    part = self._connection.recv(min(count - len(found), 2**20))
                except OSError:
                    part = b""
                if not part:
                    self._break_ended()
                found += part
            return bytes(found)

        try:
            return wire.unpack(read)
        except wire.WireError as error:
            self._break("limit-reply", f"the {self.role} sent {error}")
            raise AssertionError from error  # _break has raised

    def _wait(self, deadline: float) -> bool:
        """Waits a moment for data, looking after time, memory and output; says if there is some."""
        connection = self._connection.fileno()
        ready, _, _ = select.select([connection, self._output], [], [], GLANCE)
        if self._output in ready:
            self._drain()
        limits = self.limits
        if self._printed_bytes > limits.output_bytes:
            self._break(
                "limit-output",
                f"the {self.role} printed more than {limits.output_bytes / 1e6:.1f} MB and was "
                "stopped",
            )
        if time.monotonic() > deadline:
            self._break(
                "limit-time",
                f"the {self.role} did not answer within its time "
                f"({limits.seconds:.0f} s for most requests) and was stopped",
            )
        used = resident_bytes(self._number)
        # The kernel's own limit comes first where there is one; this holds for shared memory too.
        if used is not None and used - self._base > 1.2 * limits.memory_bytes:
            self._break(
                "limit-memory",
                f"the {self.role} took more than {limits.memory_bytes / 2**30:.1f} GiB and was "
                "stopped",
            )
        return connection in ready

    def _drain(self) -> None:
        with contextlib.suppress(BlockingIOError):
            part = os.read(self._output, 2**16)
            self._printed_bytes += len(part)
            self._printed += part[: max(0, 2**16 - len(self._printed))]

    # --- failing ---------------------------------------------------------------------------------

    def _noted(self, noted: object) -> list[Finding]:
        """Adds what the process says it was refused to the findings."""
        found = []
        for item in noted if isinstance(noted, list) else []:
            if not (isinstance(item, list) and len(item) == 2 and all(map(_is_text, item))):
                continue
            kind, what = item
            if f"limit-{kind}" in TRIED:
                found.append(failure(f"limit-{kind}", f"the {self.role} tried {one_line(what)}"))
        for one in found:
            if one.check not in {other.check for other in self.findings}:
                self.findings.append(one)
        return found

    def _error(self, error: object, do: str, refused: list[Finding]) -> Exception:
        told = error if isinstance(error, dict) else {}
        kind, message = told.get("kind"), one_line(str(told.get("message", "")))
        if refused:
            return ComponentError(refused[0])
        if kind == "mibench" and do.endswith((".load", ".build", ".find")):
            return MibenchError(message)
        said = (
            f"{one_line(str(told.get('type', '')))}: {message} ({one_line(str(told.get('where')))})"
        )
        what = f"in {do}, the {self.role} "
        if kind == "exit":
            found = failure("limit-exit", f"{what}tried to end the interpreter ({said})")
        elif kind == "memory":
            found = failure(
                "limit-memory",
                f"{what}asked for more than {self.limits.memory_bytes / 2**30:.1f} GiB ({said})",
            )
        else:
            found = failure("raises", f"{what}raised {said}")
        return ComponentError(found)

    def _break(self, check: str, found: str) -> None:
        """Ends the process and raises the finding."""
        self._end()
        self._broken = failure(check, found)
        self.findings.append(self._broken)
        raise ComponentError(self._broken)

    def _break_ended(self) -> None:
        """Says how a process ended that was still needed."""
        with contextlib.suppress(OSError):
            self._drain()
        status = self._end()
        how = f"with status {os.waitstatus_to_exitcode(status)}"
        check = "limit-exit"
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            with contextlib.suppress(ValueError):
                how = f"by signal {signal.Signals(number).name}"
            if number == signal.SIGXCPU:
                check = "limit-time"
            elif number == signal.SIGXFSZ:
                check = "limit-files"
        said = one_line(bytes(self._printed[-200:]).decode(errors="replace"))
        last = f"; it printed last: {said}" if said else ""
        self._break(check, f"the process of the {self.role} ended {how}{last}")

    def _end(self) -> int:
        """Kills the process and all that it may have started; returns its wait status."""
        if not self._open:
            return 0
        self._open = False
        self._connection.close()
        os.close(self._output)
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(self._number, signal.SIGKILL)
        return self._nursery.ended(self._number)


def isolation(confined: Mapping[str, Any]) -> str:
    """Says in words what a component was kept from by the kernel, and what it was not."""
    walls = {
        "files": "writing outside its folder and reading the user's files",
        "network": "opening connections",
        "processes": "starting programs and touching other processes",
    }
    held = [words for name, words in walls.items() if confined.get(name)]
    open_ = [words for name, words in walls.items() if not confined.get(name)]
    said = f"The component ran in processes that the kernel keeps from {', '.join(held)}."
    if open_:
        said = said if held else "The component ran in processes of its own."
        said += (
            f" NOT isolated here: {', '.join(open_)}. Python code is watched, which hostile code "
            "gets round: run what you do not trust on Linux 5.13 or later, or in a container."
        )
    missing = confined.get("missing") or []
    if missing:
        said += f" Limits that this system lacks: {', '.join(map(str, missing))}."
    return said


def environment(folder: Path) -> dict[str, str]:
    """Returns what a component's process sees of the environment: nothing that is a secret."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL") if name in os.environ}
    # Where this very package lies, and what the caller has on its path.
    paths = [str(Path(mibench.__file__).parents[1]), *_python_path()]
    one_thread = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **kept,
        **dict.fromkeys(one_thread, "1"),
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "HOME": str(folder),
        "TMPDIR": str(folder),
    }


def _python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def of_python() -> list[Path]:
    """Returns the folders that Python and this package are read from."""
    found = [Path(mibench.__file__).parent, Path(sys.prefix), Path(sys.base_prefix)]
    found += [Path(path) for path in site.getsitepackages()]
    found += [Path(path) for path in (*SYSTEM, *_python_path())]
    return [path.resolve() for path in found if path.exists()]


def resident_bytes(number: int) -> int | None:
    """Returns the resident memory of a process in bytes, where the system tells."""
    try:
        pages = Path(f"/proc/{number}/statm").read_text(encoding="ascii").split()[1]
    except FileNotFoundError:
        return _asked_bytes(number) if sys.platform == "darwin" else None
    except (OSError, IndexError):
        return None
    return int(pages) * resource.getpagesize()


def _asked_bytes(number: int) -> int | None:
    asked = subprocess.run(  # noqa: S603 - a fixed command
        ["/bin/ps", "-o", "rss=", "-p", str(number)], capture_output=True, check=False, text=True
    )
    return int(asked.stdout) * 1024 if asked.stdout.strip().isdigit() else None


def _is_text(value: object) -> bool:
    return isinstance(value, str)
