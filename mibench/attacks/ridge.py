"""Ridge regression from shares to pixels: the linear attack, and the judge of coalitions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mibench import seeding
from mibench.defenses.base import Shares

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Candidates, relative to the mean variance of the inputs times their number."""
MAX_INPUTS = 2048
"""Longer messages are projected at random to this length, which keeps most of what is linear."""
BLOCK = 2**14
"""Values of a message that are projected at once."""
SIDE = 32
"""Larger images are predicted at this size: coalitions are ranked, not images rebuilt."""


def ridge_error(
    shares: Shares, images: Tensor, other_shares: Shares, other_images: Tensor, seed: int
) -> float:
    """Fits on one set and returns the mean squared error on the other, with the best penalty.

    Args:
        shares: what the adversary receives for ``images``, batch axis first.
        images: (N, 3, H, W) in [0, 1]; predicted as `shrink` leaves them.
        other_shares: shares of ``other_images``.
        other_images: (M, 3, H, W) in [0, 1].
        seed: of the random projection.
    """
    reader, equations = Reader.of([shares], seed), Equations()
    equations.add(reader(shares), shrink(images).flatten(1))
    seen, wanted = reader(other_shares), shrink(other_images).flatten(1)
    return min(equations.solve(penalty).error(seen, wanted) for penalty in PENALTIES)


def shrink(images: Tensor, side: int = SIDE) -> Tensor:
    """Averages images (N, 3, H, W) down to ``side`` pixels; smaller ones stay as they are."""
    height, width = images.shape[2:]
    if max(height, width) <= side:
        return images
    return F.adaptive_avg_pool2d(images, (min(height, side), min(width, side)))


@dataclass(frozen=True)
class Reader:
    """Shares → inputs (N, n) of the regression: standardised, and projected where they are long.

    Attributes:
        mean: of each value of all shares, one after the other, (d,).
        std: its deviation, infinite for values that are constant: they tell nothing.
        seed: of the random projection.
    """

    mean: Tensor
    std: Tensor
    seed: int

    @classmethod
    def of(cls, batches: Iterable[Shares], seed: int) -> Reader:
        """Measures mean and deviation over batches of shares."""
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for shares in batches:
            size, before = len(shares[0]), count
            own = torch.cat([block.mean(0) for block in _blocks(shares)])
            spread = torch.cat([block.var(0, correction=0) for block in _blocks(shares)])
            count += size
            away = own - mean.to(own.device)
            squares = squares.to(own.device) + size * spread
            squares = squares + away.square() * (before * size / count)
            mean = mean.to(own.device) + away * (size / count)
        std = (squares / max(count - 1, 1)).sqrt()
        return cls(mean, torch.where(std > 1e-6, std, torch.inf), seed)

    def __call__(self, shares: Shares) -> Tensor:
        """Returns the inputs of these shares."""
        length = len(self.mean)
        if length <= MAX_INPUTS:
            (block,) = _blocks(shares)
            return (block - self.mean) / self.std
        draws = seeding.generator(self.seed, "ridge projection")
        inputs, at = shares[0].new_zeros(()), 0
        for block in _blocks(shares):
            size = block.shape[1]
            # What a share tells does not depend on its scale, so neither may the penalty.
            one = (block - self.mean[at : at + size]) / self.std[at : at + size]
            projection = torch.randn(size, MAX_INPUTS, generator=draws) / math.sqrt(length)
            inputs, at = inputs + one @ projection.to(one.device), at + size
        return inputs


class Solution(NamedTuple):
    """A linear map with clipped answers.

    Attributes:
        weights: (n, outputs).
        centre: inputs (n,) for which the answer is the offset.
        offset: (outputs,).
    """

    weights: Tensor
    centre: Tensor
    offset: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        """Inputs (N, n) → answers (N, outputs) in [0, 1]."""
        return torch.addmm(self.offset, inputs - self.centre, self.weights).clamp(0, 1)

    def error(self, inputs: Tensor, wanted: Tensor) -> float:
        """Returns the mean squared error."""
        return (self(inputs) - wanted).square().mean().item()


class Equations:
    """The normal equations of a ridge regression with an intercept, added up batch by batch."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: tuple[Tensor, ...] = ()

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Adds pairs of inputs (N, n) and outputs (N, m) in [0, 1]."""
        y = outputs - 0.5  # nearly centred: less is lost to rounding
        sums = (inputs.T @ inputs, inputs.T @ y, inputs.sum(0), y.sum(0))
        before = self._sums or tuple(map(torch.zeros_like, sums))
        self._sums = tuple(a + b for a, b in zip(before, sums, strict=True))
        self._count += len(inputs)

    def solve(self, penalty: float) -> Solution:
        """Returns the solution for a penalty relative to the mean squared norm of an input."""
        gram, cross, x, y = self._sums
        gram = gram - torch.outer(x, x / self._count)
        cross = cross - torch.outer(x, y / self._count)
        scale = gram.diagonal().mean().clamp_min(1e-12)
        gram.diagonal().add_(penalty * scale)
        weights = torch.linalg.solve(gram, cross)
        return Solution(weights, x / self._count, y / self._count + 0.5)


def _blocks(shares: Shares) -> Iterator[Tensor]:
    """Yields the values of all shares (N, n), no more than `BLOCK` of each image at once."""
    rows = [share.flatten(1) for share in shares]
    if sum(row.shape[1] for row in rows) <= BLOCK:
        yield torch.cat(rows, dim=1)
        return
    for row in rows:
        yield from torch.split(row, BLOCK, dim=1)
