"""Random dropping of features, with a fresh mask for every message."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mibench.defenses.base import TOLERANCE, Defense, Shares
from mibench.registry import defenses
from mibench.training import Step


@defenses.register(
    "dropout", servers="1", randomness="fresh per message", paper="He et al., IEEE IoTJ 2020"
)
class Dropout(Defense):
    """Each value of the features is set to zero with probability r, anew for every message.

    z = m f(x), m ~ Bernoulli(1 - r) for each value, without the factor 1 / (1 - r). All values are
    sent, zeros too, so the bytes counted are those of the dense features.

    The published attack on this defense compares features without gaps to features with gaps. Here
    attacks meet its law: a value that arrived pins f down; a zero was dropped, or stands for a
    feature that is zero,

        log p(0 | f) = log(r + (1 - r) exp(-f^2 / 2 t^2)),

    with t the tolerance of every deterministic message. He et al. drop features of a finished
    model: ``training=post_hoc``. By default the model is trained with the gaps. One mask per
    message covers a share 1 - r of the values; an attacker who sees m messages covers 1 - r^m.
    """

    class Params(Defense.Params):
        """How much is dropped, and whether the model has learned with it."""

        rate: float = Field(default=0.8, gt=0, lt=1, description="r, share of values dropped")
        training: Literal["noise_aware", "post_hoc"] = Field(
            default="noise_aware", description="train with the gaps, or make them in a plain model"
        )

    params: Params

    def predict(self, images: Tensor) -> Shares:
        """Returns the features before anything is dropped."""
        return (self.client(images),)

    def protect(self, images: Tensor) -> Shares:
        """Returns the features with a fresh mask."""
        (z,) = self.predict(images)
        # In full precision: bf16 is too coarse for rates near 0 and 1. Of the shape alone: in the
        # layout of channels-last features a draw is slow on CPUs.
        kept = torch.rand(z.shape, device=z.device) >= self.params.rate
        return (z * kept,)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """A mixture for the zeros, a narrow Gaussian for every value that arrived."""
        z, f, rate = shares[0].flatten(1), predicted[0].flatten(1), self.params.rate
        arrived = z != 0
        power = z.square().sum(1) / arrived.sum(1).clamp_min(1)
        tolerance = TOLERANCE * power.sqrt().clamp_min(1e-6)[:, None]
        kept = math.log1p(-rate) - (z - f).square() / (2 * tolerance.square())
        gone = torch.full_like(kept, math.log(rate))
        return torch.where(arrived, kept, torch.logaddexp(gone, kept)).sum(1)

    def training_logits(self, images: Tensor, step: Step) -> Tensor:
        """Through the gaps or, post hoc, without."""
        if self.params.training == "post_hoc":
            return self.answer(self.predict(images))
        return super().training_logits(images, step)
