"""What an image set is: images with labels, kept as bytes wherever they lie."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mibench.errors import DataError

CHUNK = 256
"""Images that are looked at at a time where a whole set is walked through."""


class Pixels(Protocol):
    """Rows of images that need not lie in memory: a tensor, or anything that is read like one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, 3, H, W)."""

    def __getitem__(self, rows: Tensor | slice, /) -> Tensor:
        """Returns the images of these rows as uint8 (n, 3, H, W), on the CPU."""


class Selected:
    """Chosen rows of larger pixels; no other row can be reached from here.

    Each image is compared with its hash when it is first read, so what was damaged on disk since it
    was decoded is not used unnoticed.

    Args:
        pixels: the larger pixels.
        rows: int64 (N,), the chosen rows.
        digests: SHA-256 of each chosen image, uint8 (N, 32).
    """

    def __init__(self, pixels: Pixels, rows: Tensor, digests: Tensor) -> None:
        self.__pixels = pixels
        self.__rows = rows
        self.__digests = digests
        self.__checked = torch.zeros(len(rows), dtype=torch.bool)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, 3, H, W)."""
        return len(self.__rows), *self.__pixels.shape[1:]

    def __getitem__(self, index: Tensor | slice, /) -> Tensor:
        """Returns the chosen images at ``index``, uint8 (n, 3, H, W).

        Raises:
            DataError: an image is not what it was when its hash was taken.
        """
        images = self.__pixels[self.__rows[index]]
        known = self.__digests[index]
        for place in (~self.__checked[index]).nonzero().flatten().tolist():
            if digest(images[place]) != bytes(known[place].numpy()):
                raise DataError(
                    "a decoded image in the cache is damaged; delete the folder 'images' of the "
                    "cache (`mibench doctor` names it) and run again."
                )
        self.__checked[index] = True
        return images

    def at(self, index: Tensor) -> Selected:
        """Returns the chosen images at ``index``, without reading them."""
        return Selected(self.__pixels, self.__rows[index], self.__digests[index])


class ImageSet:
    """Images with labels, kept as bytes wherever they lie and handed out as floats.

    Args:
        pixels: uint8 (N, 3, H, W), in memory or not.
        labels: one per image: int64 (N,), or uint8 (N, A) of attributes.
        digests: SHA-256 of each image's bytes, uint8 (N, 32), where they are known already.
    """

    def __init__(self, pixels: Pixels, labels: Tensor, digests: Tensor | None = None) -> None:
        self.pixels = pixels
        self.labels = labels
        self._known = digests

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W)."""
        channels, height, width = self.pixels.shape[1:]
        return channels, height, width

    def raw(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Returns the images at ``index`` as uint8 (n, 3, H, W)."""
        return self.pixels[index]

    def images(self, index: Tensor | slice = slice(None)) -> Tensor:
        """Returns the images at ``index`` as floats (n, 3, H, W) in [0, 1]."""
        return self.raw(index).float() / 255

    def chunks(self, size: int = CHUNK) -> Iterator[Tensor]:
        """Yields all images in order, as floats, so many at a time."""
        for start in range(0, len(self), size):
            yield self.images(slice(start, start + size))

    def take(self, count: int) -> ImageSet:
        """Returns the first ``count`` images."""
        return self.at(torch.arange(min(count, len(self))))

    def at(self, index: Tensor) -> ImageSet:
        """Returns the images at ``index``, without reading them."""
        digests = None if self._known is None else self._known[index]
        chosen = self.pixels.at(index) if isinstance(self.pixels, Selected) else self.pixels[index]
        return ImageSet(chosen, self.labels[index], digests)

    def hashes(self) -> list[str]:
        """Returns the manifest: SHA-256 of each decoded image's bytes, in order."""
        return [bytes(row).hex() for row in self._digests.numpy()]

    @cached_property
    def identity(self) -> str:
        """SHA-256 over all images and labels in order, shortened to 16 hexadecimal digits."""
        digest = hashlib.sha256(self._digests.numpy().tobytes())
        digest.update(self.labels.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def _digests(self) -> Tensor:
        if self._known is not None:
            return self._known
        found = []
        for start in range(0, len(self), CHUNK):
            found += [digest(image) for image in self.raw(slice(start, start + CHUNK))]
        return torch.from_numpy(np.frombuffer(b"".join(found), np.uint8).reshape(-1, 32).copy())


def digest(image: Tensor) -> bytes:
    """Returns the SHA-256 of one decoded image (3, H, W), uint8."""
    return hashlib.sha256(image.contiguous().numpy().tobytes()).digest()


def stack(images: list[Tensor], labels: list[int]) -> ImageSet:
    """Builds a set in memory from uint8 (3, H, W) tensors and their classes."""
    return ImageSet(torch.stack(images), torch.tensor(labels, dtype=torch.int64))
