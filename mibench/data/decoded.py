"""Decoded images on disk: decoded once, read when they are wanted, never all in memory.

A split is cut into shards of `SHARD` images. A shard is one safetensors file, written whole or not
at all, so decoding that was interrupted goes on at the next shard, and protocols that use other
parts of a split share its shards. Where the images would take too much of the disk, a shard holds
their hashes and labels alone and the images are decoded whenever they are read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import PIL
import safetensors
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as safetensors_numpy
from torch import Tensor

from mibench import progress
from mibench.data.base import Dataset
from mibench.data.images import Decoder, UnfitImageError
from mibench.data.sets import ImageSet, Selected, digest
from mibench.data.tables import Rows
from mibench.errors import DataError, InvalidParamsError
from mibench.files import Json, content_id, ensure_writable, storage_error, write_atomically
from mibench.registry import fingerprint

SHARD = 1024
"""Images of a shard."""
BATCH = 64
"""Encoded images that are in memory at a time."""
LIMIT = "MIBENCH_DECODED_GB"
_FORMAT = 2
_BESIDE = ("labels", "digests", "readable", "animated")
"""What a shard holds beside its images, one row per image."""


@dataclass(frozen=True)
class Source:
    """One split as it was found, with encoded images.

    Attributes:
        title: what it is called while it is decoded.
        origin: everything that its images and labels follow from.
        rows: its rows, images encoded.
        image_column: where the images are, each a mapping with ``bytes`` or a ``path``.
        label: makes a row's label, or raises `UnfitImageError`.
        blank: the label of a row that has none.
        decoder: decodes one image.
    """

    title: str
    origin: Mapping[str, Json]
    rows: Rows
    image_column: str
    label: Callable[[Mapping[str, Any]], Tensor]
    blank: Tensor
    decoder: Decoder

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def key(self) -> str:
        """Names the decoded images: another source, decoder or size has another name."""
        made_by: dict[str, Json] = {
            "format": _FORMAT,
            "decoder": fingerprint(Decoder),
            "pillow": PIL.__version__,
            "size": self.decoder.size,
            "exact": self.decoder.exact,
        }
        return content_id({**self.origin, **made_by})

    def image(self, row: Mapping[str, Any]) -> Tensor:
        """Decodes a row's image to uint8 (3, S, S).

        Raises:
            UnfitImageError: it cannot be used.
        """
        return self.decoder(self.encoded(row))

    def encoded(self, row: Mapping[str, Any]) -> bytes | Path:
        """Returns a row's image as it was found.

        Raises:
            UnfitImageError: there is none.
        """
        cell = row[self.image_column] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise UnfitImageError("is missing")
        return Path(cell["path"])

    def problem(self, number: int) -> str | None:
        """Says why a row cannot be used, in words that follow its name; None if it can."""
        [row] = self.rows.read([number])
        try:
            self.image(row)
            self.label(row)
        except UnfitImageError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class _Shard:
    """What a shard holds beside its images.

    Attributes:
        labels: one per row.
        digests: uint8 (n, 32).
        fit: bool (n,), rows that can be used.
        animated: bool (n,), images of which only the first frame is used.
        offset: where the images start in the file; None if it holds none.
    """

    labels: Tensor
    digests: Tensor
    fit: Tensor
    animated: Tensor
    offset: int | None


class Decoded:
    """The images of a split, read like a tensor (rows, 3, S, S); see `mibench.data.sets.Pixels`.

    Args:
        source: the split.
        cache: folder of the cache; the shards lie in ``images/<key>`` below it.
    """

    def __init__(self, source: Source, cache: Path) -> None:
        self.source = source
        self._folder = cache / "images" / source.key
        self._shards: dict[int, _Shard] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, 3, S, S)."""
        return len(self.source), 3, self.source.decoder.size, self.source.decoder.size

    def load(self, start: int, count: int) -> tuple[ImageSet, list[int], str]:
        """Decodes images ``start`` to ``start + count``, unless that was done before.

        Returns:
            The images that can be used, the numbers of those that cannot, and what is wrong with
            the first of these.

        Raises:
            StorageError: the cache cannot be written.
            InvalidParamsError: the limit in the environment is not a number.
        """
        shards, inside = self._provided(start, count)
        fit = torch.cat([shard.fit for shard in shards])[inside]
        labels = torch.cat([shard.labels for shard in shards])[inside]
        digests = torch.cat([shard.digests for shard in shards])[inside]
        rows = torch.arange(start, start + count)
        chosen = Selected(self, rows[fit], digests[fit])
        images = ImageSet(chosen, labels[fit], digests[fit])
        unfit = rows[~fit].tolist()
        problems = {row: self.source.problem(row) for row in unfit[:BATCH]}
        healed = {row // SHARD for row, problem in problems.items() if problem is None}
        if healed:  # a disk or a network that failed for a while must not be remembered
            for number in healed:
                del self._shards[number]
                self._path(number).unlink(missing_ok=True)
            return self.load(start, count)
        return images, unfit, problems[unfit[0]] or "" if unfit else ""

    def animated(self, start: int, count: int) -> int:
        """Counts those of images ``start`` to ``start + count`` that are a first frame of several.

        Raises:
            StorageError: the cache cannot be written.
            InvalidParamsError: the limit in the environment is not a number.
        """
        shards, inside = self._provided(start, count)
        return int(torch.cat([shard.animated for shard in shards])[inside].sum())

    def __getitem__(self, rows: Tensor | slice, /) -> Tensor:
        """Returns the images of these rows, which were loaded before, as uint8 (n, 3, S, S).

        Raises:
            StorageError: the cache was damaged or removed meanwhile.
            DataError: an image is decoded on access and was damaged meanwhile.
        """
        every = torch.arange(len(self.source))
        wanted = (every[rows] if isinstance(rows, slice) else rows).numpy()
        found = np.empty((len(wanted), *self.shape[1:]), np.uint8)
        numbers = wanted // SHARD
        bare: list[int] = []
        for number in np.unique(numbers).tolist():
            places = (numbers == number).nonzero()[0]
            if self._shards[number].offset is None:
                bare += places.tolist()
            else:
                self._copy(number, wanted, places, found)
        for start in range(0, len(bare), BATCH):
            self._decode(wanted, bare[start : start + BATCH], found)
        return torch.from_numpy(found)

    def _copy(
        self,
        number: int,
        wanted: NDArray[np.int64],
        places: NDArray[np.int64],
        found: NDArray[np.uint8],
    ) -> None:
        # Reads, and no memory map: a map of what was read, and of its neighbours, would count as
        # memory of this process, and takes longer in a random order.
        start, size = self._shards[number].offset, int(np.prod(self.shape[1:]))
        assert start is not None, "the caller decodes the images of bare shards"
        path = self._path(number)
        try:
            with path.open("rb", buffering=0) as file:
                for place in places.tolist():
                    file.seek(start + (int(wanted[place]) - number * SHARD) * size)
                    if file.readinto(found[place].data) != size:
                        raise OSError(errno.EIO, "the file ends too early")
        except OSError as error:
            raise storage_error("read", path, error) from error

    def _decode(
        self, wanted: NDArray[np.int64], places: list[int], found: NDArray[np.uint8]
    ) -> None:
        images = self._pool.map(self.source.image, self.source.rows.read(wanted[places].tolist()))
        try:
            for place, image in zip(places, images, strict=True):
                found[place] = image.numpy()
        except UnfitImageError as error:
            raise DataError(
                f"an image of {self.source.title} {error}, but was not before; "
                "copy the files again."
            ) from error

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(os.cpu_count())

    # --- shards -----------------------------------------------------------------------------------

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.safetensors"

    def _rows(self, number: int) -> range:
        return range(number * SHARD, min((number + 1) * SHARD, len(self.source)))

    def _provided(self, start: int, count: int) -> tuple[list[_Shard], slice]:
        """The shards of so many images, and where the images lie in these shards' rows."""
        numbers = range(start // SHARD, -(-(start + count) // SHARD))
        self._provide(numbers)
        first = start - numbers.start * SHARD
        return [self._shards[number] for number in numbers], slice(first, first + count)

    def _provide(self, numbers: range) -> None:
        """Makes the shards that are missing, damaged, or without images though there is room."""
        for number in numbers:
            if number not in self._shards and (shard := self._open(number)) is not None:
                self._shards[number] = shard
        bare = [n for n in numbers if n not in self._shards or self._shards[n].offset is None]
        if not bare:
            return
        ensure_writable(self._folder)
        keep = self._has_room(sum(len(self._rows(number)) for number in bare))
        if keep:
            missing = bare
        else:
            progress.note(
                f"{self.source.title}: images are decoded whenever they are read, as all of them "
                f"would take too much of the disk ({LIMIT} sets how much)"
            )
            missing = [number for number in bare if number not in self._shards]
        total = sum(len(self._rows(number)) for number in missing)
        if not total:
            return
        with progress.task(f"Decoding {self.source.title}", total) as task:
            for number in missing:
                self._make(number, keep, task)

    def _has_room(self, images: int) -> bool:
        size = images * int(np.prod(self.shape[1:]))
        present = sum(file.stat().st_size for file in self._folder.glob("*.safetensors"))
        free = shutil.disk_usage(self._folder).free
        return present + size <= _limit() and size <= free / 2

    def _make(self, number: int, keep: bool, task: progress.Task) -> None:
        rows = self._rows(number)
        labels = self.source.blank.expand(len(rows), *self.source.blank.shape).clone()
        tensors = {
            "labels": labels.numpy(),
            "digests": np.zeros((len(rows), 32), np.uint8),
            "readable": np.zeros(len(rows), bool),
            "animated": np.zeros(len(rows), bool),
        }
        if keep:
            tensors["pixels"] = np.zeros((len(rows), *self.shape[1:]), np.uint8)
        for first in range(0, len(rows), BATCH):
            batch = self.source.rows.read(rows[first : first + BATCH])
            for place, item in enumerate(self._pool.map(self._prepare, batch), first):
                if item is not None:
                    image, label, name, tensors["animated"][place] = item
                    labels[place] = label
                    tensors["digests"][place] = np.frombuffer(name, np.uint8)
                    tensors["readable"][place] = True
                    if keep:
                        tensors["pixels"][place] = image.numpy()
            task.advance(len(batch))
        check = {"check": self._check(number, tensors)}
        write_atomically(self._path(number), safetensors_numpy.save(tensors, check))
        shard = self._open(number)
        assert shard is not None, "a shard that was just written is whole"
        self._shards[number] = shard

    def _prepare(self, row: Mapping[str, Any]) -> tuple[Tensor, Tensor, bytes, bool] | None:
        try:
            image, animated = self.source.decoder.first_frame(self.source.encoded(row))
            label = self.source.label(row)
        except UnfitImageError:
            return None
        return image, label, digest(image), animated

    def _check(self, number: int, held: Mapping[str, NDArray[Any]]) -> str:
        """SHA-256 over what lies beside the images of a shard, and over where it belongs.

        The images are not in it: each has its own hash there, which is compared when it is read.
        """
        found = hashlib.sha256(f"{self._folder.name} {number}".encode())
        for name in _BESIDE:
            found.update(f" {name} {held[name].dtype} {held[name].shape} ".encode())
            found.update(held[name].tobytes())
        return found.hexdigest()

    def _open(self, number: int) -> _Shard | None:
        path = self._path(number)
        try:
            # Opening checks that the file is as long as its header says.
            with safetensors.safe_open(path, "np") as file:
                held = {name: file.get_tensor(name) for name in _BESIDE}
                check = (file.metadata() or {}).get("check")
            offset = _offset(path, [len(self._rows(number)), *self.shape[1:]])
        except (OSError, SafetensorError, KeyError, ValueError):
            return None
        if check != self._check(number, held):
            return None
        labels, digests, fit, animated = (torch.from_numpy(held[name]) for name in _BESIDE)
        return _Shard(labels, digests, fit, animated, offset)


class EncodedDataset(Dataset):
    """A dataset of encoded images: a subclass finds the source of a split, the rest is done here.

    Attributes:
        more: what a user can do who has too few images, as the first words of a sentence.
    """

    more: ClassVar[str]

    def __init__(self, data_root: Path | None, image_size: int, cache: Path) -> None:
        super().__init__(data_root, image_size, cache)
        self._opened: dict[str, Decoded] = {}

    @abstractmethod
    def source(self, split: str) -> Source:
        """Returns the encoded images of a split; raises as `Dataset.size` does."""

    @abstractmethod
    def where(self, split: str) -> str:
        """Returns what messages call a split."""

    def size(self, split: str) -> int:
        """Counts the rows, unreadable images included; see `Dataset.size`."""
        return len(self.opened(split).source)

    def opened(self, split: str) -> Decoded:
        """Returns a split, opened once."""
        if split not in self._opened:
            self._opened[split] = Decoded(self.source(split), self.cache)
        return self._opened[split]

    def enough(self, split: str, start: int, count: int) -> Decoded:
        """Returns a split that holds images ``start`` to ``start + count``.

        Raises:
            DataError: it is shorter.
        """
        decoded = self.opened(split)
        if start + count > len(decoded.source):
            raise DataError(
                f"{self.where(split)} holds {len(decoded.source)} images, but the protocol needs "
                f"images {start} to {start + count}. {self.more}, or add --part to run on what is "
                "there (never ranked)."
            )
        return decoded


def _offset(path: Path, shape: list[int]) -> int | None:
    """Where the tensor ``pixels`` starts in a safetensors file, or None if it has none.

    The file starts with the length of its header (8 bytes, little-endian) and the header, JSON
    that says for each tensor where it lies behind the header.

    Raises:
        OSError: the file cannot be read.
        ValueError: its header is not JSON, or the tensor is not uint8 of this shape.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    if "pixels" not in header:
        return None
    pixels = header["pixels"]
    if (pixels["dtype"], pixels["shape"]) != ("U8", shape):
        raise ValueError("not the images of this shard")
    return 8 + length + int(pixels["data_offsets"][0])


def _limit() -> float:
    """Bytes that the decoded images of a split may take."""
    text = os.environ.get(LIMIT) or "64"
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = -1
    if not gigabytes >= 0:
        raise InvalidParamsError(f"{LIMIT} is {text!r}; give a number of gigabytes, such as 64")
    return gigabytes * 1e9
