"""Named random streams: every draw of a run comes from (seed, names), never from a shared state.

Each stage names streams of its own, so a stage that is added, skipped or served from the cache does
not shift the draws of another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *names: str | int) -> int:
    """Returns the 63-bit seed of the stream that ``names`` denotes under ``seed``."""
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """Returns a fresh CPU generator for the named stream.

    Draws are made on the CPU and moved, so that a stream gives the same numbers on every device.
    """
    import torch

    return torch.Generator().manual_seed(derive(seed, *names))


@contextmanager
def stream(seed: int, *names: str | int) -> Iterator[None]:
    """Runs a block with PyTorch's global generators set to the named stream, and restores them.

    For code that draws from the global state: initial weights, dropout, a defense's noise.
    """
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, *names))
        yield
