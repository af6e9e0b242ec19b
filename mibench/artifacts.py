"""The cache of trained things, each found again by what it was made from.

An artifact lives in `root/<kind>/<key>/`, which appears by one rename when the artifact is
complete. Beside it, hidden, are the lock of the key and, while something is being written, a
temporary folder. `root/<kind>/<key>.partial/` holds the checkpoint of a training under way.
Tensors are kept as safetensors and the rest as JSON, so reading the cache runs no code.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import platformdirs
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from mibench.errors import StorageError
from mibench.files import (
    Json,
    canonical_json,
    content_id,
    pretty_json,
    storage_error,
    temporary_name,
    write_atomically,
    write_folder,
)

log = logging.getLogger(__name__)

_FORMAT = 1
_TENSORS = "tensors.safetensors"
_RECORD = "artifact.json"
_CHECKPOINT = "checkpoint"
_CHECKPOINT_MAGIC = b"mibench checkpoint 1 "
_KIND = re.compile(r"[a-z0-9][a-z0-9_-]*")


@dataclass(frozen=True)
class Artifact:
    """Something trained, as it lies in the cache.

    Attributes:
        kind: The sort of thing, such as "inverter".
        key: The id of the kind and the spec it was made from.
        tensors: Its tensors by name: on the CPU, contiguous, sharing no memory.
        facts: What its maker reported about it.
        reused: Whether it was found in the cache instead of made by this call.
    """

    kind: str
    key: str
    tensors: dict[str, Tensor]
    facts: dict[str, Json]
    reused: bool


class Checkpoint:
    """The state of an unfinished training, from which it goes on after being killed.

    Use by one process at a time; the store's lock sees to that.

    Args:
        folder: Where the checkpoint is kept. Created by the first `save`.
        interval: Seconds between saves, for `due`.
    """

    def __init__(self, folder: Path, interval: float = 30.0) -> None:
        self._folder = folder
        self._file = folder / _CHECKPOINT
        self._interval = interval
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Json]] | None:
        """What was saved last, or None if there is nothing or it is broken (then with a warning).

        Raises:
            StorageError: There is a checkpoint and the system refuses to read it.
        """
        try:
            data = self._file.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise storage_error("read", self._file, error) from error
        head, _, body = data.partition(b"\n")
        if head != _CHECKPOINT_MAGIC + _digest(body).encode():
            log.warning("the checkpoint %s is broken; training starts anew", self._file)
            return None
        header_end = 8 + int.from_bytes(body[:8], "little")
        metadata = json.loads(body[8:header_end])["__metadata__"]
        tensors: dict[str, Tensor] = safetensors_torch.load(body)
        return tensors, json.loads(metadata["facts"])

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Json]) -> None:
        """Replaces the saved state. A crash in the middle leaves the one before.

        Args:
            tensors: Any tensors, on any device; they are copied.
            facts: The rest of the state, such as the step reached.

        Raises:
            StorageError: It cannot be written.
            ValueError: A float in `facts` is not finite.
        """
        metadata = {"facts": canonical_json(facts).decode()}
        body: bytes = safetensors_torch.save(_detached(tensors), metadata)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error("create", self._folder, error) from error
        # safetensors has no checksum, and going on from a damaged state would go unnoticed.
        write_atomically(self._file, _CHECKPOINT_MAGIC + _digest(body).encode() + b"\n" + body)
        self._last = time.monotonic()

    @property
    def begun(self) -> bool:
        """Whether an earlier process has left a state to go on from."""
        return self._folder.exists()

    def part(self, name: str) -> "Checkpoint":
        """The checkpoint of one part of a training that has several."""
        return Checkpoint(self._folder / name, self._interval)

    def due(self) -> bool:
        """Whether `interval` seconds have passed since the last save, or since the beginning."""
        return time.monotonic() - self._last >= self._interval


Maker: TypeAlias = Callable[[Checkpoint], tuple[Mapping[str, Tensor], Mapping[str, Json]]]
"""Trains something: takes the checkpoint to go on from, returns the tensors and the facts."""


class _BrokenArtifactError(Exception):
    """An artifact that is there and cannot be used; says why."""


class ArtifactStore:
    """Keeps trained things and makes those that are missing, each only once.

    Safe for any number of processes and threads at once, and for a kill at any instant.

    Args:
        root: The folder of the cache. By default that named by the environment variable
            MIBENCH_CACHE, else the user's cache folder of this system.
        checkpoint_interval: Seconds between the checkpoints that makers are asked for.
    """

    def __init__(self, root: Path | None = None, *, checkpoint_interval: float = 30.0) -> None:
        self.root = _default_root() if root is None else root
        self._interval = checkpoint_interval

    def key(self, kind: str, spec: Mapping[str, Json]) -> str:
        """The id of what this spec makes: 16 hexadecimal digits, the same in every process.

        Raises:
            ValueError: A float in `spec` is not finite, or `kind` is not a plain name.
            TypeError: Something in `spec` is not JSON.
        """
        if not _KIND.fullmatch(kind):
            raise ValueError(f"a kind is lower-case letters, digits, _ and -, not {kind!r}")
        return content_id({"kind": kind, "spec": spec})

    def contains(self, kind: str, spec: Mapping[str, Json]) -> bool:
        """Whether `fetch` will find this artifact, judged without reading its tensors.

        Raises:
            ValueError: As `key`.
            TypeError: As `key`.
        """
        place = self._place(kind, self.key(kind, spec))
        try:
            record = _read_record(place, canonical_json(spec))
            return bool((place / _TENSORS).stat().st_size == record["size"])
        except (OSError, _BrokenArtifactError):
            return False

    def fetch(self, kind: str, spec: Mapping[str, Json], make: Maker) -> Artifact:
        """The artifact of this spec: from the cache, or made now and put there.

        While `make` runs, other processes that want the same artifact wait for it; it may fetch
        other artifacts itself. An artifact that does not match its checksum is made again. What
        `make` raises passes through and leaves at most a checkpoint.

        Args:
            kind: The sort of thing, a plain lower-case name.
            spec: All that the result depends on, code versions included.
            make: Called with a checkpoint only if the artifact is missing.

        Raises:
            StorageError: The cache cannot be read or written.
            ValueError: As `key`, or a float in the facts that `make` returned is not finite.
            TypeError: As `key`, also for these facts.
        """
        key = self.key(kind, spec)
        wanted = canonical_json(spec)  # taken now: `make` could alter the spec
        place = self._place(kind, key)
        try:
            # Without the lock, so that a full cache can be used where nothing can be written.
            found = self._load(kind, key, wanted)
        except _BrokenArtifactError:
            found = None  # another process may be mending it: judge again under the lock
        if found is not None:
            self._drop_leftovers(kind, key)
            return found
        with self._locked(kind, key):
            self._sweep(kind, key)
            try:
                found = self._load(kind, key, wanted)
            except _BrokenArtifactError as error:
                log.warning("the artifact %s is unusable: %s; it is made again", place, error)
            if found is not None:
                log.info("reusing %s, made by another process meanwhile", place)
                return found
            self._discard(place)
            made = self._make(kind, key, wanted, make)
            shutil.rmtree(self._partial(kind, key), ignore_errors=True)
            return made

    def _place(self, kind: str, key: str) -> Path:
        return self.root / kind / key

    def _partial(self, kind: str, key: str) -> Path:
        return self.root / kind / f"{key}.partial"

    def _temporary(self, kind: str, key: str) -> Path:
        return self.root / kind / f".{key}{temporary_name()}"

    def _load(self, kind: str, key: str, wanted: bytes) -> Artifact | None:
        """Reads and verifies an artifact. None if there is none."""
        place = self._place(kind, key)
        try:
            if not place.is_dir():
                return None
            record = _read_record(place, wanted)
            tensors = _read_tensors(place, record)
        except FileNotFoundError as error:
            raise _BrokenArtifactError(f"{error.filename} is missing") from error
        except OSError as error:
            raise storage_error("read", place, error) from error
        return Artifact(kind, key, tensors, record["facts"], reused=True)

    def _make(self, kind: str, key: str, wanted: bytes, make: Maker) -> Artifact:
        returned, reported = make(Checkpoint(self._partial(kind, key), self._interval))
        tensors = _detached(returned)
        facts: dict[str, Json] = json.loads(canonical_json(reported))
        data: bytes = safetensors_torch.save(tensors)
        record: dict[str, Json] = {
            "format": _FORMAT,
            "kind": kind,
            "key": key,
            "spec": json.loads(wanted),
            "facts": facts,
            "facts_sha256": _digest(canonical_json(facts)),
            "sha256": _digest(data),
            "size": len(data),
        }
        files = {_TENSORS: data, _RECORD: pretty_json(record)}
        write_folder(self._place(kind, key), files, mark=f".{key}")
        return Artifact(kind, key, tensors, facts, reused=False)

    @contextmanager
    def _locked(self, kind: str, key: str, *, wait: bool = True) -> Iterator[None]:
        """Holds the lock of a key. The system frees it when the process dies.

        Raises:
            StorageError: The lock file cannot be made, or `wait` is false and it is held.
        """
        folder = self.root / kind
        lock = FileLock(folder / f".{key}.lock")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(blocking=False)
            except Timeout:
                if not wait:
                    raise
                log.info("another process is making %s; waiting for it", folder / key)
                lock.acquire(poll_interval=0.1)
        except OSError as error:
            raise storage_error("lock", folder / key, error) from error
        try:
            yield
        finally:
            lock.release()

    def _sweep(self, kind: str, key: str) -> None:
        """Removes what killed processes left. Only under the lock: then none of it is in use."""
        for leftover in (self.root / kind).glob(f".{key}.*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in self._partial(kind, key).glob(".*.tmp"):
            with suppress(OSError):
                leftover.unlink()

    def _drop_leftovers(self, kind: str, key: str) -> None:
        """Removes the checkpoint if its process died between completing and deleting it."""
        partial = self._partial(kind, key)
        if not partial.exists():
            return
        # No lock means that it is in use, or that the cache cannot be written: then it may stay.
        with suppress(StorageError), self._locked(kind, key, wait=False):
            # Seen again under the lock: a process that mends the artifact needs it.
            if self._place(kind, key).is_dir():
                shutil.rmtree(partial, ignore_errors=True)

    def _discard(self, place: Path) -> None:
        """Removes a broken artifact: out of the way first, so that no half of it remains."""
        if not os.path.lexists(place):
            return
        temporary = self._temporary(place.parent.name, place.name)
        try:
            place.rename(temporary)
            if temporary.is_dir() and not temporary.is_symlink():
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                temporary.unlink()
        except OSError as error:
            raise storage_error("remove", place, error) from error


def open_artifact(place: Path) -> tuple[Artifact, dict[str, Json]]:
    """Reads one artifact from its folder, wherever that lies, and what it was made from.

    Raises:
        StorageError: there is no artifact, it is damaged, or it cannot be read.
    """
    try:
        record = json.loads((place / _RECORD).read_bytes())
        kind, key, spec = record["kind"], record["key"], record["spec"]
        _read_record(place, canonical_json(spec))
        tensors = _read_tensors(place, record)
    except OSError as error:
        raise storage_error("read", place / _RECORD, error) from error
    except (ValueError, KeyError, TypeError, _BrokenArtifactError) as error:
        raise StorageError(
            f"{place} holds no whole artifact of the cache ({error}); give a folder such as "
            "CACHE/defense/0123456789abcdef"
        ) from error
    return Artifact(kind, key, tensors, record["facts"], reused=True), spec


def _default_root() -> Path:
    chosen = os.environ.get("MIBENCH_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return platformdirs.user_cache_path("mibench")


def _read_record(place: Path, wanted: bytes) -> dict[str, Any]:
    """The JSON part of an artifact, checked except for the checksum of the tensors."""
    try:
        record = json.loads((place / _RECORD).read_bytes())
        if not isinstance(record, dict) or record["format"] != _FORMAT:
            raise _BrokenArtifactError(f"{_RECORD} has another format")
        if canonical_json(record["spec"]) != wanted:
            raise _BrokenArtifactError(f"{_RECORD} has another spec")
        if _digest(canonical_json(record["facts"])) != record["facts_sha256"]:
            raise _BrokenArtifactError(f"the facts in {_RECORD} do not match their checksum")
        if not {"sha256", "size"} <= record.keys():
            raise _BrokenArtifactError(f"{_RECORD} lacks a field")
    except (ValueError, KeyError, RecursionError) as error:
        raise _BrokenArtifactError(f"{_RECORD} cannot be read: {error!r}") from error
    return record


def _read_tensors(place: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    # Hashing the very bytes that are loaded leaves no gap between check and use.
    data = (place / _TENSORS).read_bytes()
    if _digest(data) != record["sha256"]:
        raise _BrokenArtifactError(f"{_TENSORS} does not match its checksum")
    try:
        tensors: dict[str, Tensor] = safetensors_torch.load(data)
    except SafetensorError as error:
        raise _BrokenArtifactError(f"{_TENSORS}: {error}") from error
    return tensors


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that safetensors accepts: on the CPU, contiguous, no two of them sharing memory."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
