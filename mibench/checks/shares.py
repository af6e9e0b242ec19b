"""How shares are named where they cross between processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from mibench.defenses.base import Shares


def named(shares: Sequence[Tensor]) -> dict[str, Tensor]:
    """Returns shares as ``share.0``, ``share.1``, ..."""
    return {f"share.{k}": share for k, share in enumerate(shares)}


def unnamed(tensors: Mapping[str, Tensor], what: str = "share") -> Shares:
    """Returns ``share.0``, ``share.1``, ... as a tuple; other tensors are left aside.

    Args:
        tensors: named ones.
        what: the first word, if it is another one, such as ``reply``.
    """
    found: list[Tensor] = []
    while f"{what}.{len(found)}" in tensors:
        found.append(tensors[f"{what}.{len(found)}"])
    return tuple(found)
