"""Variational information bottleneck at the split: the client sends a sample."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mibench.backbones.base import Split
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Facts, Shares
from mibench.defenses.parts.gaussian import kl_to_standard
from mibench.defenses.parts.layers import channels_of, pointwise, standardisation
from mibench.registry import defenses
from mibench.training import Losses, Step

LOWEST, HIGHEST = -6.0, 3.0
"""Bounds of log sigma."""
SCALE = 0.3
"""Of mu at the start, in units of the standardised features."""
MEASURED = 2048
"""Training images on which the server's batch statistics are measured for mu."""
INITIAL = -1.0
"""Of log sigma: a deviation of 0.37."""


@defenses.register(
    "vib",
    servers="1",
    randomness="fresh per message",
    paper="after Alemi et al., ICLR 2017, arXiv 1612.00410",
)
class VIB(Defense):
    """A stochastic layer at the split, whose information about the image is bounded and penalised.

    Two pointwise heads read the features and emit mu(x) and log sigma(x). What is sent is a sample,
    in training and at inference:

        z = mu(x) + sigma(x) e,  e ~ N(0, I)
        L = CE + beta KL(N(mu, sigma^2) || N(0, I)),
        KL = 1/2 sum(mu^2 + sigma^2 - 2 log sigma - 1),

    summed over the values of a message, averaged over the batch, in nats. The mean of the KL is an
    upper bound on I(x; z), whatever the attack. A larger mu cannot escape it: it is paid for.

    The paper regularises a classifier and does not speak of split inference: a sample behind the
    client's layers, one for each place of a map or token, is ours. With ``transmit=mean`` the model
    is trained in the same way but sends mu: an information bottleneck no longer, though its loss
    shows the same KL. It is deterministic then, and here for comparison.

    Inferred, for the sake of optimisers with one rate for all weights: the heads read features
    standardised per channel; log sigma stays in (-6, 3) by a sigmoid, since outside a hard clamp
    there is no gradient, and a value that was thrown there stays; mu starts at 0.3 times these
    features where as many channels are sent; and the heads' outputs carry a fixed gain g. The KL is
    summed over P places, so in the weights of log sigma, which read C channels, it has a curvature
    of up to about 4 beta P C, and g^2 takes that back to 1. Plain heads diverge within ten steps of
    SGD at a rate of 0.1, at beta = 0.01 on features 64x16x16.
    """

    class Params(Defense.Params):
        """Strength and size of the bottleneck."""

        beta: float = Field(default=1e-3, gt=0, le=100, description="weight of the KL, per nat")
        channels: int | None = Field(
            default=16,
            ge=1,
            description="channels that are sent, at most as many as the split has; null: so many",
        )
        transmit: Literal["sample", "mean"] = Field(
            default="sample", description="mean sends mu, which is no information bottleneck"
        )

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        shape = split.feature_shape
        inputs = channels_of(shape)
        outputs = min(params.channels or inputs, inputs)
        self.axis = 1 if len(shape) == 3 else 2
        self.normalise = standardisation(shape)
        self.mean, self.spread = pointwise(shape, outputs), pointwise(shape, outputs)
        places = math.prod(shape) // inputs
        self.gain = min(1.0, 1 / math.sqrt(4 * params.beta * places * inputs))
        self.widen: nn.Module = nn.Identity()
        if outputs != inputs:
            sent = (outputs, *shape[1:]) if self.axis == 1 else (shape[0], outputs)
            self.widen = pointwise(sent, inputs)
        self._initialise(inputs == outputs)

    @torch.no_grad()
    def _initialise(self, square: bool) -> None:
        mean, spread = dict(self.mean.named_parameters()), dict(self.spread.named_parameters())
        if square:
            weight = mean["weight"]
            weight.copy_(SCALE * torch.eye(len(weight)).view_as(weight))
        mean["weight"].div_(self.gain)
        mean["bias"].zero_()
        spread["weight"].zero_()
        share = (INITIAL - LOWEST) / (HIGHEST - LOWEST)
        level = math.log(share / (1 - share)) * (HIGHEST - LOWEST) / 4
        spread["bias"].fill_(level / self.gain)

    def statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) → mu and log sigma, each of the shape of the message."""
        features = self.normalise(self.client(images))
        mean = self.gain * self.mean(features).float()
        # The constant lets all weights move the level of log sigma, which has the longest way to
        # go: a bias alone would take Adam thousands of steps.
        level = self.gain * self.spread(features + 1).float()
        span = HIGHEST - LOWEST
        # 4 / span: a slope of 1 in the middle, as without bounds.
        return mean, LOWEST + span * torch.sigmoid(4 / span * level)

    def protect(self, images: Tensor) -> Shares:
        """Returns a sample; with ``transmit=mean`` only while training, and mu after it."""
        mean, log_deviation = self.statistics(images)
        if self.params.transmit == "mean" and not self.training:
            return (mean,)
        return (_sample(mean, log_deviation),)

    def predict(self, images: Tensor) -> Shares:
        """Returns mu and log sigma, one behind the other along the channels; or mu if it is sent.

        Shape: maps (B, 2C, h, w) or tokens (B, N, 2C).
        """
        mean, log_deviation = self.statistics(images)
        if self.params.transmit == "mean":
            return (mean,)
        return (torch.cat([mean, log_deviation], dim=self.axis),)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """-sum((z - mu)^2 / 2 sigma^2 + log sigma); what is sent as mu is as any plain message."""
        if self.params.transmit == "mean":
            return super().log_likelihood(shares, predicted)
        mean, log_deviation = predicted[0].chunk(2, dim=self.axis)
        scaled = (shares[0] - mean) * torch.exp(-log_deviation)
        return -(scaled.square() / 2 + log_deviation).flatten(1).sum(1)

    def serve(self, index: int, share: Tensor) -> Tensor:  # noqa: ARG002
        """The server; in front of it a layer that widens a message of fewer channels."""
        reply: Tensor = self.server(self.widen(share))
        return reply

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:  # noqa: ARG002
        """The task's loss on a sample, and beta times the KL in nats."""
        mean, log_deviation = self.statistics(images)
        logits = self.answer((_sample(mean, log_deviation),))
        nats = kl_to_standard(mean, log_deviation).mean()
        return {"task": self.task.loss(logits, labels), "information": self.params.beta * nats}

    @torch.no_grad()
    def finish(self, train: ImageSet) -> None:
        """With ``transmit=mean``, the server's batch statistics are measured anew.

        Those of the training are of samples, whose variance is many times that of mu.
        """
        if self.params.transmit == "sample":
            return
        layers = [
            m for m in self.server.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)
        ]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean of all batches
            layer.train()
        device = next(self.parameters()).device
        for some in train.take(MEASURED).chunks():
            self(some.to(device))
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            layer.eval()

    @torch.no_grad()
    def examine(self, images: ImageSet) -> Facts:
        """Mean KL of these images: an upper bound on I(x; z) of one sample, none for mu."""
        if self.params.transmit == "mean":
            why = "no bound: mu is sent, and the KL bounds what a sample tells"
            return {"information_nats": None, "information_bits": None, "information": why}
        device = next(self.parameters()).device
        total = sum(
            kl_to_standard(*self.statistics(some.to(device))).sum().item()
            for some in images.chunks()
        )
        nats = total / len(images)
        return {"information_nats": nats, "information_bits": nats / math.log(2)}

    def client_modules(self) -> Iterable[nn.Module]:
        """Stem and heads; the normalisation has no parameters."""
        return [self.client, self.normalise, self.mean, self.spread]


def _sample(mean: Tensor, log_deviation: Tensor) -> Tensor:
    # Of the shape alone: a draw in the memory layout of channels-last features is slow on CPUs.
    return mean + log_deviation.exp() * torch.randn(mean.shape, device=mean.device)
