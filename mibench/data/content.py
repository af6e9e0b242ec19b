"""Names files by what they hold, so that nothing that was made of them outlives them."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mibench import progress

WHOLE = 256_000_000
"""Bytes up to which a file is hashed whole."""
EDGE = 2**20
"""Bytes at both ends of a larger file that are hashed."""
_THREADS = 8
_BATCH = 512
_UNREADABLE = b"unreadable"

_known: dict[bytes, str] = {}


def content_key(files: Sequence[Path], root: Path | None, title: str) -> str:
    """Names files by their names and their content, 64 hexadecimal digits.

    The place of the files does not count, nor when a file was written unless it is too large to be
    hashed whole (then its size, the time of its last change and its first and last MiB count). A
    file that cannot be read counts as such. Files that did not change while the process runs are
    hashed once.

    Args:
        files: the files, in order.
        root: folder that is left out of the names; None for the folder of each file.
        title: what the files are called while they are hashed.
    """
    state = _state(files, root)
    if state not in _known:
        _known[state] = _hash_all(files, root, title)
    return _known[state]


def _state(files: Sequence[Path], root: Path | None) -> bytes:
    """What the system says about the files; the time of its own last change cannot be set."""
    found = hashlib.sha256(os.fsencode(root or ""))
    for file in files:
        try:
            status = os.stat(file)  # noqa: PTH116 - Path.stat is slower
        except OSError:
            fields: tuple[int, ...] = ()
        else:
            times = status.st_mtime_ns, status.st_ctime_ns
            fields = (status.st_dev, status.st_ino, status.st_size, *times)
        found.update(b"%s\0%s\0" % (os.fsencode(file), repr(fields).encode()))
    return found.digest()


def _hash_all(files: Sequence[Path], root: Path | None, title: str) -> str:
    found = hashlib.sha256()
    with (
        progress.task(f"Hashing {title}", len(files)) as task,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        for start in range(0, len(files), _BATCH):
            batch = files[start : start + _BATCH]
            for file, content in zip(batch, pool.map(_hash, batch), strict=True):
                name = file.name if root is None else file.relative_to(root).as_posix()
                # No name holds a zero byte.
                found.update(b"%s\0%s\0" % (os.fsencode(name), content))
            task.advance(len(batch))
    return found.hexdigest()


def _hash(path: Path) -> bytes:
    try:
        status = os.stat(path)  # noqa: PTH116 - Path.stat is slower
        if not stat.S_ISREG(status.st_mode):  # a pipe would never end
            return _UNREADABLE
        with path.open("rb", buffering=0) as file:
            if status.st_size <= WHOLE:
                return hashlib.file_digest(file, "sha256").hexdigest().encode()
            found = hashlib.sha256(b"%d %d " % (status.st_size, status.st_mtime_ns))
            found.update(file.read(EDGE))
            file.seek(-EDGE, os.SEEK_END)
            found.update(file.read(EDGE))
    except OSError:
        return _UNREADABLE
    return found.hexdigest().encode()
