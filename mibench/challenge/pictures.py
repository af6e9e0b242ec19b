"""Reconstructions as they are sent back: numbered PNGs of 8-bit RGB, and nothing else."""

from __future__ import annotations

import hashlib
import stat
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from mibench.challenge.schema import Challenge
from mibench.checks.base import one_line
from mibench.errors import DataError
from mibench.files import ensure_writable, storage_error, write_atomically
from mibench.stored import from_png, to_bytes, to_png

ROOM = 2**14
"""Bytes that a PNG may have beyond its uncompressed pixels."""
MOST_TOLD = 20
"""Problems that are told one by one."""


def save_reconstructions(images: Tensor, folder: Path) -> None:
    """Writes reconstructions as they are to be sent back.

    Args:
        images: (N, 3, H, W) in [0, 1], in the order of the challenge.
        folder: created where it is missing.

    Raises:
        StorageError: something cannot be written.
    """
    ensure_writable(folder)
    for index, image in enumerate(to_bytes(images)):
        write_atomically(folder / f"{index:04}.png", to_png(Image.fromarray(image)))


def read_reconstructions(folder: Path, challenge: Challenge) -> tuple[Tensor, str]:
    """Reads what an attacker has sent back.

    Returns:
        Images (N, 3, H, W) in [0, 1], and the SHA-256 over the bytes of the files in order.

    Raises:
        DataError: the folder does not hold exactly the images that the challenge asks for; tells
            all problems at once.
    """
    problems = _strangers(folder, challenge)
    digest, found = hashlib.sha256(), []
    for name in challenge.names():
        try:
            data = _bytes(folder / name, challenge.image_size)
            digest.update(data)
            found.append(from_png(data, challenge.image_size))
        except ValueError as error:
            problems.append(f"{name} {one_line(str(error))}")
    if problems:
        told = problems[:MOST_TOLD]
        if len(problems) > MOST_TOLD:
            told.append(f"and {len(problems) - MOST_TOLD} more")
        raise DataError(f"{folder} does not hold what the challenge asks for: {'; '.join(told)}")
    return torch.stack(found).float() / 255, digest.hexdigest()


def _strangers(folder: Path, challenge: Challenge) -> list[str]:
    """What the challenge does not ask for."""
    if folder.is_symlink() or not folder.is_dir():
        raise DataError(f"there is no folder {folder} of reconstructions")
    try:
        there = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise storage_error("read", folder, error) from error
    wanted = set(challenge.names())
    return [f"{one_line(name)} is not asked for" for name in there if name not in wanted]


def _bytes(path: Path, side: int) -> bytes:
    """The content of a plain file of reasonable size."""
    try:
        facts = path.lstat()
        if stat.S_ISLNK(facts.st_mode):
            raise ValueError("is a symbolic link, not a file")
        if not stat.S_ISREG(facts.st_mode):
            raise ValueError("is no plain file")
        largest = 3 * side * side + side + ROOM
        if facts.st_size > largest:
            raise ValueError(f"has {facts.st_size} bytes, and {largest} are enough")
        return path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError("is missing") from error
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
