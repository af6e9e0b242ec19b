"""What runs in the child processes: a component under limits, which answers primitive requests.

``python -m mibench.checks.host FD PRELOAD`` is the *nursery*. It imports PyTorch and mibench once,
before any code of a component, and forks a fresh child for every role that is asked for. A child
confines itself (see `mibench.checks.confine`), and only then loads a component.

A child answers requests until its connection closes. A request is ``{"do": "defense.protect",
...}`` with named tensors; the answer is ``{"ok": {...}}`` with tensors, or ``{"error": {...}}``.
Handlers are plain functions registered with `handles`; those whose names begin with ``KIND.`` live
in the module ``mibench.checks.KIND_host``, which is imported by the first such request, so a new
kind is one new file.

Nothing that a child says is believed for its own sake: it shares its process with the component.
Verdicts are made by the parent, from the tensors that come back.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mibench.checks import confine, wire
from mibench.errors import MibenchError
from mibench.files import Json

Tensors: TypeAlias = dict[str, Tensor]
Answer: TypeAlias = tuple[dict[str, Json], Tensors]
"""What a handler returns: JSON and named tensors."""
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "std::bad_alloc")


@dataclass
class State:
    """What a child holds between requests.

    Attributes:
        folder: its own folder, the only one that it may write in.
        parts: objects by name, such as ``defense`` or ``attack``; what a handler builds for later
            requests it keeps here.
    """

    folder: Path
    parts: dict[str, Any] = field(default_factory=dict)


Handler: TypeAlias = Callable[[State, Mapping[str, Any], Tensors], Answer]
_handlers: dict[str, Handler] = {}


def handles(name: str) -> Callable[[Handler], Handler]:
    """Registers the handler of a request.

    Args:
        name: ``KIND.verb``; its module is ``mibench.checks.KIND_host``.
    """

    def register(handler: Handler) -> Handler:
        _handlers[name] = handler
        return handler

    return register


# --- the child -----------------------------------------------------------------------------------


def serve(connection: socket.socket, config: Mapping[str, Any]) -> None:
    """Confines this process and answers requests until the connection closes."""
    state = State(Path(config["folder"]))
    noted: list[list[str]] = []
    confined = _confine(state.folder, config, noted)
    connection.sendall(wire.pack({"ok": confined}, {}))
    read = _reader(connection)
    while True:
        try:
            header, tensors = wire.unpack(read)
        except EOFError:
            return
        try:
            said, sent = _handler(header["do"])(state, header, tensors)
            frame = wire.pack({"ok": said, "noted": list(noted)}, sent)
        except BaseException as error:  # sys.exit() is a finding too
            frame = wire.pack({"error": _told(error), "noted": list(noted)}, {})
        noted.clear()
        connection.sendall(frame)


def _handler(name: str) -> Handler:
    if name not in _handlers:
        importlib.import_module(f"mibench.checks.{name.partition('.')[0]}_host")
    return _handlers[name]


def _confine(folder: Path, config: Mapping[str, Any], noted: list[list[str]]) -> dict[str, Json]:
    """Returns what is in force: limits that are missing, and which walls stand."""
    missing = confine.limit(confine.Limits(**config["limits"]))
    readable = [Path(path) for path in config["readable"]]
    files, tcp = confine.landlock(folder, readable)
    calls = confine.seccomp()
    confine.watch(folder, lambda kind, what: noted.append([kind, what]))
    return {"missing": missing, "files": files, "network": calls or tcp, "processes": calls}


def _reader(connection: socket.socket) -> Callable[[int], bytes]:
    def read(count: int) -> bytes:
        found = bytearray()
        while len(found) < count:
            part = connection.recv(min(count - len(found), 2**20))
            if not part:
                raise EOFError
            found += part
        return bytes(found)

    return read


def _told(error: BaseException) -> dict[str, Json]:
    """An exception as JSON: its kind, type, message and place."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and len(chain) < 10:
        chain.append(one)
        one = one.__cause__
    message = " ".join(str(error).split())[:2000]
    kind = "raised"
    if any(isinstance(e, SystemExit | KeyboardInterrupt) for e in chain):
        kind = "exit"
    elif any(
        isinstance(e, MemoryError) or any(words in str(e) for words in OUT_OF_MEMORY) for e in chain
    ):
        kind = "memory"
    elif isinstance(error, MibenchError):
        kind = "mibench"
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return {"kind": kind, "type": type(error).__name__, "message": message, "where": where}


# --- the nursery ---------------------------------------------------------------------------------


def nursery(control: socket.socket) -> None:
    """Forks a child for every request of the parent, and reports how children ended."""
    control.sendall(b"ready\n")
    while True:
        data, files, _, _ = socket.recv_fds(control, 2**16, 2)
        if not data:
            return
        asked = json.loads(data)
        if "wait" in asked:
            _, status = os.waitpid(asked["wait"], 0)
            control.sendall(f"{status}\n".encode())
            continue
        child = os.fork()
        if child == 0:
            _begin(files[0], files[1], asked)
        for file in files:
            os.close(file)
        control.sendall(f"{child}\n".encode())


def _begin(connection: int, output: int, config: Mapping[str, Any]) -> None:
    """Becomes a child; never returns."""
    status = 1
    try:
        os.setsid()
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # end with the nursery
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        confine.close_others([0, 1, 2, connection])
        folder = config["folder"]
        os.chdir(folder)
        os.environ.update(HOME=folder, TMPDIR=folder, XDG_CACHE_HOME=folder, MIBENCH_CACHE=folder)
        tempfile.tempdir = folder  # was chosen before the fork
        serve(socket.socket(fileno=connection), config)
        status = 0
    except BaseException:  # the parent reads it as output
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    """Entry point of the nursery: the number of its control socket, and modules to import."""
    control = socket.socket(fileno=int(sys.argv[1]))
    sys.dont_write_bytecode = True
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name in ("mibench.checks.component_host", *sys.argv[2:]):
        importlib.import_module(name)
    nursery(control)


if __name__ == "__main__":
    # Handlers register with the module of this name, not with __main__.
    from mibench.checks import host

    host.main()
