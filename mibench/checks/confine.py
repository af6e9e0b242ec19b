"""Puts the process that it is called in under limits that it cannot take off again.

Runs in the child, before any code of a component is imported. Nothing here needs root. Linux offers
Landlock (files, TCP, signals) and seccomp (system calls); elsewhere only limits of the process and
Python's own audit hook are left, which honest code cannot get round and hostile code can.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import resource
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Limits:
    """What a component's process may use.

    Attributes:
        seconds: wall-clock time of one request.
        cpu_seconds: processor time of the process, all requests together.
        memory_bytes: memory above what the process has before the component is loaded.
        output_bytes: what it may print, standard output and errors together.
        file_bytes: size of one file in its own folder.
        files: open files.
    """

    seconds: float = 60.0
    cpu_seconds: int = 300
    memory_bytes: int = 3 * 2**30
    output_bytes: int = 2**20
    file_bytes: int = 64 * 2**20
    files: int = 256

    def described(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


# --- limits of the process -----------------------------------------------------------------------


def limit(limits: Limits) -> list[str]:
    """Sets the limits of the kernel; returns what could not be set, in words."""
    missing = []
    wanted = [
        (resource.RLIMIT_CORE, 0, "core dumps"),
        (resource.RLIMIT_FSIZE, limits.file_bytes, "size of files"),
        (resource.RLIMIT_NOFILE, limits.files, "open files"),
    ]
    used = _data_bytes()
    if used is None:
        missing.append("memory (watched from outside only)")
    else:
        # Not the address space: torch maps gigabytes of libraries that it never touches.
        wanted.append((resource.RLIMIT_DATA, used + limits.memory_bytes, "memory"))
    for what, value, name in [*wanted, (resource.RLIMIT_CPU, limits.cpu_seconds, "time")]:
        # At the soft limit of time comes a signal that says so, at the hard one the end.
        most = value + 5 if what == resource.RLIMIT_CPU else value
        try:
            resource.setrlimit(what, (value, most))
        except (OSError, ValueError):
            missing.append(name)
    return missing


def _data_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData")), None)


# --- Landlock: files, TCP, signals ---------------------------------------------------------------

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_OF_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights of the file system that a version of Landlock knows, from this version on."""


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def landlock(folder: Path, readable: Iterable[Path]) -> tuple[bool, bool]:
    """Leaves the process its own folder to write in and some others to read.

    Returns:
        Whether files are confined, and whether TCP is refused by it as well.
    """
    if not sys.platform.startswith("linux"):
        return False, False
    libc = _libc()
    version = libc.syscall(_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False, False
    rights = _RIGHTS[max(known for known in _RIGHTS if known <= version)]
    # Bind and connect; then abstract sockets and signals to processes outside.
    attributes = struct.pack("QQQ", rights, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = libc.syscall(_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if rules < 0:
        return False, False
    try:
        allowed = [(path, _EXECUTE | _READ | _LIST) for path in readable]
        allowed += [(Path("/proc/self"), _READ | _LIST)]  # what it leads to now: this process
        allowed += [(folder, rights), (Path("/dev/null"), _READ | _WRITE)]
        for path, some in allowed:
            _allow(libc, rules, path, some & rights)
        _no_new_privileges(libc)
        done = libc.syscall(_RESTRICT, rules, ctypes.c_uint32(0)) == 0
    finally:
        os.close(rules)
    return done, done and version >= 4


def _allow(libc: Any, rules: int, path: Path, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there needs no rule
    try:
        if not path.is_dir():
            rights &= _OF_FILES
        rule = struct.pack("=Qi", rights, place)
        libc.syscall(_ADD, rules, ctypes.c_int(1), rule, ctypes.c_uint32(0))
    finally:
        os.close(place)


def _no_new_privileges(libc: Any) -> None:
    if libc.prctl(38, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def end_with_parent() -> None:
    """Ends this process when its parent is killed, which could not end it any more.

    Call it after `namespaces`, which undoes it.
    """
    if sys.platform.startswith("linux"):
        _libc().prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL


# --- namespaces: a network of its own ------------------------------------------------------------

_NEW_USER, _NEW_NET, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000


def namespaces() -> bool:
    """Gives the process a network of its own, without any interface, and no rights over others'.

    Many systems forbid this to processes without root; the other walls then stand alone. Call it
    before the process has a second thread.

    Returns:
        Whether it is in force.
    """
    if not sys.platform.startswith("linux"):
        return False
    return bool(_libc().unshare(_NEW_USER | _NEW_NET | _NEW_IPC) == 0)


# --- seccomp: system calls -----------------------------------------------------------------------

_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_DENIED = {
    "socket": (41, 198),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "tkill": (200, 130),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "setrlimit": (160, 164),
    "chroot": (161, 51),
    "pivot_root": (155, 41),
    "mount": (165, 40),
    "umount2": (166, 39),
    "setns": (308, 268),
    "unshare": (272, 97),
    "reboot": (169, 142),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "kexec_load": (246, 104),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    # Landlock lets everybody change modes, owners, times and attributes of any file.
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    # It carries out other calls where no filter sees them.
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
"""Numbers of the calls that are refused, by machine in the order above."""
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_KILL, _TGKILL = (62, 129), (234, 131)


def seccomp() -> bool:
    """Refuses system calls that no component needs; threads may still be made.

    Returns:
        Whether it is in force.
    """
    machine = platform.machine()
    if not sys.platform.startswith("linux") or machine not in _MACHINES:
        return False
    program = _program(machine)
    code = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(code, len(code))

    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_void_p))

    filtered = Filter(len(program), ctypes.cast(buffer, ctypes.c_void_p))
    libc = _libc()
    _no_new_privileges(libc)
    return bool(libc.prctl(22, 2, ctypes.byref(filtered), 0, 0) == 0)


def _program(machine: str) -> list[tuple[int, int, int, int]]:
    """Returns the filter in the kernel's byte code: (code, jump if true, if false, operand)."""
    column = list(_MACHINES).index(machine)
    load, equal, above, bits, answer = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, unknown = 0x7FFF0000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
    lines = [
        (load, 0, 0, 4),
        (equal, 1, 0, _MACHINES[machine]),
        (answer, 0, 0, refuse),
        (load, 0, 0, 0),
        (above, 0, 1, 0x40000000),  # the 32-bit calls of x86
        (answer, 0, 0, refuse),
    ]
    for number in (numbers[column] for numbers in _DENIED.values()):
        if number is None:
            continue
        lines += [(equal, 0, 1, number), (answer, 0, 0, refuse)]
    # The C library goes on with clone, whose flags can be seen.
    lines += [(equal, 0, 1, _CLONE3[column]), (answer, 0, 0, unknown)]
    thread = 0x10000
    lines += [
        (equal, 0, 4, _CLONE[column]),
        (load, 0, 0, 16),
        (bits, 1, 0, thread),
        (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]
    for number in (_KILL[column], _TGKILL[column]):  # signals to itself, as abort() sends
        lines += [
            (equal, 0, 4, number),
            (load, 0, 0, 16),
            (equal, 1, 0, os.getpid()),
            (answer, 0, 0, refuse),
            (answer, 0, 0, allow),
        ]
    # Limits can be read but not set: the pointer to new ones is null.
    for half in (32, 36):
        lines += [
            (load, 0, 0, 0),
            (equal, 0, 3, _PRLIMIT[column]),
            (load, 0, 0, half),
            (equal, 1, 0, 0),
            (answer, 0, 0, refuse),
        ]
    return [*lines, (answer, 0, 0, allow)]


# --- Python's own events -------------------------------------------------------------------------

_OF_PATHS = {
    "os.remove": 1,
    "os.rmdir": 1,
    "os.mkdir": 1,
    "os.truncate": 1,
    "os.chmod": 1,
    "os.chown": 1,
    "os.rename": 2,
    "os.link": 2,
    "os.symlink": 2,
}
"""Events whose first arguments are paths, and how many of them."""
_OF_NETWORK = {
    "socket.__new__",
    "socket.connect",
    "socket.bind",
    "socket.sendto",
    "socket.getaddrinfo",
    "socket.gethostbyname",
}
_OF_PROCESSES = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "pty.spawn",
    "os.kill",
    "os.killpg",
}


def watch(folder: Path, noted: Callable[[str, str], None]) -> None:
    """Refuses and notes what Python code tries beyond its folder; cannot be taken off.

    Where the kernel confines the process this only explains; elsewhere it is all there is.

    Args:
        folder: where it may write.
        noted: told the kind (``files``, ``network``, ``process``) and what was tried.
    """
    own = os.path.realpath(folder)

    def outside(path: object) -> bool:
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        if not isinstance(path, str | os.PathLike):
            return False  # an open file
        real = os.path.realpath(path)
        return real != own and not real.startswith(own + os.sep) and real != "/dev/null"

    def refuse(kind: str, what: str) -> None:
        noted(kind, what[:200])
        raise PermissionError(errno.EACCES, f"mibench check refuses {what[:200]}")

    def hook(event: str, arguments: Sequence[Any]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITING and outside(path):
                refuse("files", f"to write {os.fspath(path)!r}")
        elif event in _OF_PATHS:
            for path in arguments[: _OF_PATHS[event]]:
                if outside(path):
                    refuse("files", f"{event} of {path!r}")
        elif event == "socket.__new__" and arguments[1] == socket.AF_UNIX:
            return  # a pair inside the process; the kernel refuses to connect one
        elif event == "socket.__new__" and arguments[1] == socket.AF_INET6:
            # Libraries ask in this way whether there is such a thing, and use it for nothing.
            raise PermissionError(errno.EACCES, "mibench check refuses sockets")
        elif event in _OF_NETWORK:
            refuse("network", event)
        elif event in _OF_PROCESSES:
            refuse("process", event)

    sys.addaudithook(hook)


def close_others(kept: Iterable[int]) -> None:
    """Closes every open file but the named ones."""
    keep = set(kept)
    top = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 3)
    listed = Path("/proc/self/fd")
    numbers: Iterable[int] = range(min(top, 4096))
    if listed.is_dir():
        numbers = [int(path.name) for path in listed.iterdir()]
    for number in numbers:
        if number not in keep:
            with contextlib.suppress(OSError):
                os.close(number)
