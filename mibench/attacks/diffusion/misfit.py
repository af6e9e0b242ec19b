"""How far an image is from what the servers received: the term that guides a diffusion attack."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from mibench.defenses.base import TOLERANCE, Shares
from mibench.errors import InvalidParamsError
from mibench.threat import Target


class Misfit(ABC):
    """What received shares say against images.

    Args:
        values: number of values that the adversary received per image.
    """

    def __init__(self, values: int) -> None:
        self.values = values

    @abstractmethod
    def nats(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → -log p(shares | images) (B,), or what stands for it."""

    def residual(self, images: Tensor) -> Tensor:
        """What a gradient through the denoiser lessens (B,), here sqrt(2 nats / values).

        For Gaussian noise that is |z - client(x)| over its expected size: the un-squared norm of
        DPS (Chung et al., arXiv 2209.14687).
        """
        return (2 * self.nats(images) / self.values).clamp_min(1e-12).sqrt()


class Likelihood(Misfit):
    """The defense's own law, whatever it is: adaptive by construction."""

    def __init__(self, target: Target, shares: Shares) -> None:
        super().__init__(sum(share[0].numel() for share in shares))
        self._target, self._shares = target, shares

    def nats(self, images: Tensor) -> Tensor:
        """-log p(z | x)."""
        return -self._target.log_likelihood(self._shares, self._target.client(images))


class _Compared(Misfit):
    """A distance between messages, which takes the prediction for a message."""

    def __init__(self, target: Target, shares: Shares) -> None:
        super().__init__(sum(share[0].numel() for share in shares))
        self._target, self._shares = target, shares

    def _predicted(self, images: Tensor) -> Shares:
        predicted = self._target.client(images)
        for share, guess in zip(self._shares, predicted, strict=True):
            if share.shape[1:] != guess.shape[1:]:
                raise InvalidParamsError(
                    f"attack.distance: this defense sends {tuple(share.shape[1:])} and predicts "
                    f"{tuple(guess.shape[1:])}, the parameters of its law, which only the "
                    "likelihood can read; set attack.distance=likelihood"
                )
        return predicted


class Euclidean(_Compared):
    """|z - client(x)| / |z| over all shares together, blind to the defense's law.

    In nats it is a Gaussian with `TOLERANCE` times the root mean square of the message, the law of
    a deterministic defense.
    """

    def _relative(self, images: Tensor) -> Tensor:
        predicted = self._predicted(images)
        pairs = zip(self._shares, predicted, strict=True)
        error = torch.stack([(z - f).flatten(1).square().sum(1) for z, f in pairs]).sum(0)
        energy = torch.stack([z.flatten(1).square().sum(1) for z in self._shares]).sum(0)
        return error / energy.clamp_min(1e-12)

    def nats(self, images: Tensor) -> Tensor:
        """Values times |z - f|^2 / (2 TOLERANCE^2 |z|^2)."""
        return self.values * self._relative(images) / (2 * TOLERANCE**2)

    def residual(self, images: Tensor) -> Tensor:
        """|z - f| / |z|."""
        return self._relative(images).clamp_min(1e-12).sqrt()


class Cosine(_Compared):
    """Mean over positions of 1 - cos(z_p, client(x)_p): the distance of DRAG, arXiv 2509.11724.

    A position is a token, a place of a map, or a whole vector. Positions at which nothing arrived
    do not count. In nats it is a Gaussian on unit vectors, since |a - b|^2 = 2 (1 - cos).
    """

    def residual(self, images: Tensor) -> Tensor:
        """Mean of 1 - cos."""
        total = images.new_zeros(len(images))
        count = images.new_zeros(len(images))
        for share, guess in zip(self._shares, self._predicted(images), strict=True):
            one, other = positions(share), positions(guess)
            arrived = (one != 0).any(2)
            # Of a vector of zeros the gradient would not be finite.
            away = (1 - F.cosine_similarity(one, other, dim=2, eps=1e-6)) * arrived
            total, count = total + away.sum(1), count + arrived.sum(1)
        return total / count.clamp_min(1)

    def nats(self, images: Tensor) -> Tensor:
        """Values times (1 - cos) / TOLERANCE^2."""
        return self.values * self.residual(images) / TOLERANCE**2


DISTANCES: dict[str, type[Likelihood | _Compared]] = {
    "likelihood": Likelihood,
    "l2": Euclidean,
    "cosine": Cosine,
}


def positions(share: Tensor) -> Tensor:
    """Reads a share as vectors at positions, (B, P, C): maps by place, tokens, else one vector."""
    if share.ndim == 4 and share.shape[1] > 1:
        return share.flatten(2).transpose(1, 2)
    if share.ndim == 3 and share.shape[2] > 1:
        return share
    return share.flatten(1).unsqueeze(1)
