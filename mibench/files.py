"""Writing files so that a reader sees the whole old file or the whole new one, never a part.

Also the one canonical form of JSON from which content ids are made. Nothing here imports torch.
"""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from mibench.errors import StorageError

Json: TypeAlias = bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"] | None
"""Anything JSON can hold. Sequences are read back as lists, mappings as dicts."""

_NOT_A_FOLDER = ("a part of this path is a file", "choose a path whose parents are all folders")
_NO_PERMISSION = ("permission denied", "choose a folder that you may write to")
_KEPT = "the trained parts in the cache are kept"

# errno -> (what happened, what to do)
_ADVICE = {
    errno.ENOSPC: ("the disk is full", f"free some space and run again; {_KEPT}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some space and run again; {_KEPT}"),
    errno.EFBIG: (
        "the file is larger than allowed here",
        f"raise the limit and run again; {_KEPT}",
    ),
    errno.EROFS: ("the file system is read-only", "choose a folder on a writable one"),
    errno.EACCES: _NO_PERMISSION,
    errno.EPERM: _NO_PERMISSION,
    errno.ENOTDIR: _NOT_A_FOLDER,
    errno.EEXIST: _NOT_A_FOLDER,
    errno.ENOENT: ("the folder does not exist", "create it first or choose another"),
    errno.EISDIR: ("it is a folder", "choose the path of a file"),
    errno.ENAMETOOLONG: ("the path is too long", "choose a shorter one"),
    errno.EIO: ("the disk reported an error", "check the disk or choose another"),
}


def storage_error(action: str, path: Path, error: OSError) -> StorageError:
    """Turns a failed system call into one line for the user.

    Args:
        action: What was tried, as a verb: "write", "create".
        path: The path the user knows, not that of a temporary file.
        error: What the system said.

    Returns:
        The error to raise, `from error`.
    """
    what, remedy = _ADVICE.get(
        error.errno or 0,
        (error.strerror or str(error) or "unknown error", "check the path and run again"),
    )
    return StorageError(f"cannot {action} {path}: {what}; {remedy}")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file so that a crash at any instant leaves the old content or the new.

    A symbolic link is followed: the file it points to is replaced and the link stays.

    Args:
        path: The file to write. Its folder must exist.
        data: The whole new content.

    Raises:
        StorageError: The file cannot be written. The old one, if any, is untouched.
    """
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            # Replacing a folder fails, and replacing a device such as /dev/stdout would succeed.
            raise StorageError(f"cannot write {path}: not a regular file; choose another path")
        _write_new_and_replace(target, data)
    except OSError as error:
        raise storage_error("write", path, error) from error
    sync_folder(target.parent)


def _write_new_and_replace(target: Path, data: bytes) -> None:
    temporary = target.with_name(temporary_name())
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            # Without this a power cut after the rename can leave an empty file.
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:  # an interrupt from the keyboard must not leave the file either
        _remove_quietly(temporary)
        raise


def write_folder(place: Path, files: Mapping[str, bytes], *, mark: str = "") -> None:
    """Writes a new folder of files, which appears whole or not at all.

    Args:
        place: The folder. It must not be there yet; folders above it are made.
        files: Content by name.
        mark: Begins the name that the folder has until it is whole.

    Raises:
        StorageError: It cannot be written. Nothing of it is left.
    """
    temporary = place.with_name(f"{mark}{temporary_name()}")
    try:
        temporary.mkdir(parents=True)
        for name, data in files.items():
            write_atomically(temporary / name, data)
        temporary.rename(place)
    except OSError as error:
        raise storage_error("write", place, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(place.parent)


def plain_name(name: str) -> str:
    """A component's name as one folder: that of a plugin may hold a slash."""
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in name).lstrip(".") or "-"


def temporary_name() -> str:
    """A hidden file name, unlike any other, for something that is not finished yet."""
    return f".mibench-{secrets.token_hex(8)}.tmp"


def sync_folder(folder: Path) -> None:
    """Asks the system to make renames in a folder outlast a power cut, where it can.

    Never raises for a refusal: the files are whole and in place already, and some network file
    systems cannot do this.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_writable(folder: Path) -> None:
    """Creates a folder, parents included, and proves that a file can be written in it.

    Raises:
        StorageError: It cannot be created, or nothing can be written in it.
    """
    probe = folder / temporary_name()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("xb") as file:
                file.write(b"\0")  # one byte: an empty file can be made on a full disk
                file.flush()
                os.fsync(file.fileno())
        finally:
            _remove_quietly(probe)
    except OSError as error:
        raise storage_error("write in", folder, error) from error


def _remove_quietly(path: Path) -> None:
    with contextlib.suppress(OSError):  # the error that brought us here matters more
        path.unlink(missing_ok=True)


def canonical_json(value: Json) -> bytes:
    """The one byte string that stands for a JSON value, whatever the order of its mappings.

    An int and the float equal to it are different values here: 1 and 1.0 give different bytes.

    Raises:
        ValueError: A float is not finite, or a string cannot be encoded in UTF-8.
        TypeError: Something is not JSON, or a key is not a string.
    """
    text = json.dumps(
        _plain(value), sort_keys=True, allow_nan=False, ensure_ascii=False, separators=(",", ":")
    )
    return text.encode()


def pretty_json(value: Json) -> bytes:
    """JSON to be read by people: sorted keys, two spaces of indent, a newline at the end.

    Raises:
        ValueError: A float is not finite, or a string cannot be encoded in UTF-8.
        TypeError: Something is not JSON, or a key is not a string.
    """
    text = json.dumps(_plain(value), sort_keys=True, allow_nan=False, ensure_ascii=False, indent=2)
    return f"{text}\n".encode()


def content_id(value: Json, length: int = 16) -> str:
    """A short name for a JSON value: equal values have equal ids.

    Args:
        value: Any JSON value.
        length: Hexadecimal digits to keep, 1 to 64.

    Raises:
        ValueError: As `canonical_json`, or `length` is out of range.
        TypeError: As `canonical_json`.
    """
    if not 1 <= length <= 64:
        raise ValueError(f"length must be 1 to 64, not {length}")
    return hashlib.sha256(canonical_json(value)).hexdigest()[:length]


def _plain(value: Any) -> Any:
    """The same value in dicts and lists, which are all that the json module takes."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                # json would write 1 and "1" as the same key.
                raise TypeError(f"JSON keys must be strings, not {key!r}")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [_plain(item) for item in value]
    raise TypeError(f"not a JSON value: {type(value).__name__}")
