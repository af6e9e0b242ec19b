"""Shares in 8 bits, as a client with little traffic to spare would send them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mibench.defenses.base import Shares

LEVELS = 256


@dataclass(frozen=True)
class Quantiser:
    """Rounds shares to 256 equal steps between the extremes that auxiliary images have.

    The range of each share is fixed beforehand, so a receiver needs nothing beside the bytes. What
    lies outside is clipped.

    Attributes:
        low: of each share.
        step: of each share; 0 for one that is constant.
    """

    low: tuple[float, ...]
    step: tuple[float, ...]

    @classmethod
    def of(cls, shares: Shares) -> Quantiser:
        """Finds the ranges of the shares of auxiliary images."""
        ends = [share.aminmax() for share in shares]
        return cls(
            tuple(float(end.min) for end in ends),
            tuple((float(end.max) - float(end.min)) / (LEVELS - 1) for end in ends),
        )

    def codes(self, shares: Shares) -> Shares:
        """Returns the shares as uint8."""
        return tuple(
            ((share - low) / (step or 1.0)).round().clamp(0, LEVELS - 1).to(torch.uint8)
            for share, low, step in self._each(shares)
        )

    def rounded(self, shares: Shares) -> Shares:
        """Returns the shares as a receiver of the bytes reads them."""
        return tuple(
            code.float() * step + low for code, low, step in self._each(self.codes(shares))
        )

    def clipped(self, shares: Shares) -> float:
        """Share of all values that lie outside the range by more than half a step."""
        outside = [
            ((share < low - step / 2) | (share > low + (LEVELS - 0.5) * step)).double().mean()
            for share, low, step in self._each(shares)
        ]
        sizes = torch.tensor([share[0].numel() for share in shares], dtype=torch.float64)
        return float((torch.stack(outside) * sizes).sum() / sizes.sum())

    def _each(self, shares: Sequence[Tensor]) -> list[tuple[Tensor, float, float]]:
        return list(zip(shares, self.low, self.step, strict=True))
