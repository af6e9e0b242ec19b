"""Shredder: learned noise tensors for a finished network, one of them drawn for every message."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from mibench.backbones.base import Split
from mibench.data.sets import ImageSet
from mibench.defenses.base import TOLERANCE, Defense, Facts, Phase, Shares
from mibench.defenses.parts.mechanism import laplace_like
from mibench.registry import defenses
from mibench.training import Losses, Step

NETWORK, NOISE = "network", "noise"
MEASURED = 1024
"""Training images on which the scale of the features is measured."""
CHUNK = 128
REACH = 0.1
"""Unit of the learned noise over the norm of all tensors together; with it, the rate that suits
weights moves noise of any size by about its own amount."""


@defenses.register(
    "shredder",
    servers="1",
    randomness="fresh per message",
    paper="Mireshghallah et al., ASPLOS 2020, arXiv 1905.11814",
)
class Shredder(Defense):
    """Noise that the network was not made for, but that was made for the network.

    The network is trained plainly and then frozen. J tensors n_j of the features' shape start as
    Laplace noise and learn

        L = L_task(f(x) + n_j) - lambda mean_j log(|n_j - n|^2 / E|f(x)|^2),

    j drawn for each image and n the mean tensor: much noise, in directions that the task does not
    mind. In use, j is drawn for every message. Or, with ``draw=fitted``, location and scale of a
    Laplace law are fitted to the J values of each element, and every message has fresh noise of it.

    Attacks know the collection. Their law is the mixture over it,

        log p(z | x) = log sum_j exp(-|z - f(x) - n_j|^2 / 2 t^2),

    with t the tolerance of every deterministic message, or the fitted Laplace law.

    From the paper: a frozen network, learned additive tensors, the trade of task against the ratio
    of signal to noise, one draw per query. Inferred, since the versions of the paper differ: the
    logarithm, J, that all tensors learn together (the authors train one after the other), the share
    of the training, and that noise is counted about the mean of the collection: what all tensors
    have in common is a known shift and hides nothing. Left out: multiplicative noise.
    """

    class Params(Defense.Params):
        """Number of tensors, their start, the weight of their power, and how they are drawn."""

        strength: float = Field(
            default=5.0, ge=0, description="lambda, weight of the noise's power"
        )
        tensors: int = Field(default=16, ge=10, le=1024, description="J, size of the collection")
        initial: float = Field(
            default=1.0, gt=0, description="RMS of the first noise over that of the features"
        )
        draw: Literal["collection", "fitted"] = Field(
            default="collection",
            description="send a learned tensor, or draw from a Laplace law fitted to them",
        )

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        self.noise = Collection(params.tensors, split.feature_shape, fitted=params.draw == "fitted")
        self.noise.start(signal=1.0, ratio=params.initial)
        self.frozen = False

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The network, and then the noise."""
        return (Phase(NETWORK, 0.75), Phase(NOISE, 0.25))

    def begin(self, phase: str, train: ImageSet) -> None:
        """Freezes the finished network and starts the noise at the features' scale."""
        self.frozen = phase == NOISE
        for part in (self.client, self.server):
            part.requires_grad_(not self.frozen)
        self.noise.requires_grad_(self.frozen)
        if self.frozen:
            self.noise.start(self._signal(train), self.params.initial)

    def train(self, mode: bool = True) -> Self:
        """Also keeps the statistics of a frozen network as they are."""
        super().train(mode)
        if self.frozen:
            self.client.eval()
            self.server.eval()
        return self

    def predict(self, images: Tensor) -> Shares:
        """Returns the features, without noise."""
        return (self.client(images),)

    def protect(self, images: Tensor) -> Shares:
        """Returns the features with a tensor of the collection, or with noise of its law."""
        (clean,) = self.predict(images)
        if self.params.draw == "fitted":
            return (clean + self.noise.location + self.noise.scale * laplace_like(clean),)
        return (clean + self.noise.draw(len(clean)),)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """The mixture over the collection, or the fitted Laplace law."""
        residual = (shares[0] - predicted[0]).flatten(1)
        if self.params.draw == "fitted":
            location, scale = self.noise.location.flatten(), self.noise.scale.flatten()
            return -((residual - location).abs() / scale).sum(1)
        tolerance = TOLERANCE * shares[0].flatten(1).square().mean(1).sqrt().clamp_min(1e-6)
        noise: Tensor = self.noise().flatten(1)
        # |r - n|^2 by a product of matrices: J tensors for each image would fill the memory.
        squares = residual.square().sum(1, keepdim=True) + noise.square().sum(1)
        distances = squares - 2 * residual @ noise.T
        return (-distances / (2 * tolerance.square()[:, None])).logsumexp(1)

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:
        """The task's loss, and behind the network's phase the reward for the noise's power."""
        terms = dict(super().loss(images, labels, step))
        if step.phase != NETWORK and self.params.strength:
            terms["noise"] = -self.params.strength * self.noise.log_ratio().mean()
        return terms

    def training_logits(self, images: Tensor, step: Step) -> Tensor:
        """Plainly, and behind the network's phase with a tensor of the collection."""
        if step.phase == NETWORK:
            return self.answer(self.predict(images))
        return self.answer((self.client(images) + self.noise.draw(len(images)),))

    @torch.no_grad()
    def finish(self, train: ImageSet) -> None:  # noqa: ARG002
        """Fits the Laplace law to what was learned."""
        if self.params.draw == "fitted":
            self.noise.fit()

    @torch.no_grad()
    def describe(self) -> Facts:
        """Power of the features over that of the noise, in dB."""
        return {"snr_db": -10 / math.log(10) * self.noise.log_ratio().mean().item()}

    def client_modules(self) -> Iterable[nn.Module]:
        """The client keeps the collection, also where it draws from the law fitted to it."""
        return [self.client, self.noise]

    @torch.no_grad()
    def _signal(self, train: ImageSet) -> float:
        """RMS of the features of training images."""
        device = self.noise.values.device
        squares = [
            self.client(some.to(device)).double().square().flatten(1).mean(1)
            for some in train.take(MEASURED).chunks(CHUNK)
        ]
        return torch.cat(squares).mean().sqrt().item()


class Collection(nn.Module):
    """J learned noise tensors of one shape.

    Args:
        tensors: J.
        shape: of the features.
        fitted: whether it also holds a Laplace law of each element.
    """

    signal: Tensor
    location: Tensor
    scale: Tensor

    def __init__(self, tensors: int, shape: tuple[int, ...], *, fitted: bool) -> None:
        super().__init__()
        self.shape = (tensors, *shape)
        # On one axis, where no weight decay shrinks it.
        self.values = nn.Parameter(torch.zeros(math.prod(self.shape)))
        self.register_buffer("signal", torch.ones(()))
        if fitted:
            self.register_buffer("location", torch.zeros(shape))
            self.register_buffer("scale", torch.ones(shape))

    def forward(self) -> Tensor:
        """Returns all tensors, (J, ...)."""
        unit = self.signal * (REACH * math.sqrt(len(self.values)))
        return unit * self.values.view(self.shape)

    def draw(self, count: int) -> Tensor:
        """Returns so many of the tensors, each drawn anew."""
        index = torch.randint(self.shape[0], (count,), device=self.values.device)
        return self.forward()[index]

    @torch.no_grad()
    def start(self, signal: float, ratio: float) -> None:
        """Replaces the tensors by Laplace noise.

        Args:
            signal: RMS of the features.
            ratio: RMS of the noise over that.
        """
        self.signal.fill_(signal)
        self.values.copy_(
            laplace_like(self.values.cpu()) * ratio / math.sqrt(2 * len(self.values)) / REACH
        )

    def log_ratio(self) -> Tensor:
        """Logarithm of each tensor's power about the mean tensor over the features' power, (J,)."""
        tensors = self.forward().flatten(1)
        power = (tensors - tensors.mean(0)).square().mean(1) * len(tensors) / (len(tensors) - 1)
        return (power / self.signal.square()).log()

    def fit(self) -> None:
        """Fits a Laplace law to the J values of each element: median, and deviation from it."""
        tensors = self.forward()
        self.location.copy_(tensors.median(0).values)
        # Values that agree by chance must not make a law without width.
        width = (tensors - self.location).abs().mean(0)
        self.scale.copy_(torch.maximum(width, 1e-3 * self.signal))
