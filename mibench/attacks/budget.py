"""How many images an attack works on at once, so that large images need no more memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mibench import progress
from mibench.defenses.base import Shares

VALUES = 2**22
"""Pixel values at once: 1,365 images of 32 pixels, 341 of 64, or 27 of 224."""
BYTES = 2**11
"""Memory that one pixel value takes, with all activations that lead to its gradient: measured on
the client of He et al. behind ReLU22, a wide one."""
SHARE = 0.5
"""Share of the free memory that an attack begins with."""


def images_at_once(image_shape: tuple[int, ...], device: torch.device | None = None) -> int:
    """Returns how many images of shape (3, H, W) are worked on at once, at least one.

    Args:
        image_shape: (3, H, W).
        device: where they are worked on; on a CUDA device the free memory of it decides, elsewhere
            `VALUES` and the free memory of the system, where it is known. None, for work whose
            draws or sums depend on the groups: `VALUES` alone, since a result must not depend on
            how much memory was free.
    """
    values = math.prod(image_shape)
    if device is None:
        return max(1, VALUES // values)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, int(SHARE * free) // (BYTES * values))
    # A system that hands out more memory than it has ends the process instead of refusing.
    return max(1, int(min(VALUES, SHARE * free_memory() / BYTES)) // values)


def free_memory(table: Path = Path("/proc/meminfo")) -> float:
    """Returns the bytes of main memory that are free, infinite where the system does not say."""
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB$", table.read_text(), re.MULTILINE)
    except OSError:
        found = None
    return 1024.0 * int(found[1]) if found else math.inf


def out_of_memory(error: BaseException) -> bool:
    """Says whether an exception means that memory ran out, on whatever device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def split(work: Callable[[slice], Tensor], count: int, size: int) -> Tensor:
    """Works on ``count`` images in groups, in order, and halves the groups when memory runs out.

    A group that failed begins anew from the random state that it met. So if ``work`` draws image
    by image, the result does not depend on the size of the groups.

    Args:
        work: places of a group among all images → its results, batch axis first.
        count: all images.
        size: most images of a group.

    Returns:
        The results of all groups, one after the other.

    Raises:
        RuntimeError: memory does not suffice for one image; as the device raised it.
    """
    parts: list[Tensor] = []
    start = 0
    while start < count:
        part = slice(start, min(start + size, count))
        state = _random_state()
        try:
            parts.append(work(part))
        except (RuntimeError, MemoryError) as error:
            if part.stop - start == 1 or not out_of_memory(error):
                raise
            size = (part.stop - start) // 2
        else:
            start = part.stop
            continue
        # Only here, since the exception holds the tensors of the failed attempt.
        progress.note(f"memory ran out; going on with {size} images at once")
        _restore(state)
    return torch.cat(parts)


def in_groups(
    attack: Callable[[Shares, Tensor], Tensor], shares: Shares, weights: Tensor, size: int
) -> Tensor:
    """Attacks images group by group, in order; see `split`.

    Args:
        attack: (shares, weight per image (B,)) → images.
        shares: what was received, batch axis first.
        weights: one per image, (N,).
        size: most images of a group.

    Returns:
        Images (N, 3, H, W).
    """

    def work(part: slice) -> Tensor:
        return attack(tuple(share[part] for share in shares), weights[part])

    return split(work, len(weights), size)


def _random_state() -> tuple[Tensor, list[Tensor]]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), devices


def _restore(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
        torch.cuda.empty_cache()
