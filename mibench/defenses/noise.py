"""Additive noise on the features, calibrated to their scale."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mibench.backbones.base import Split
from mibench.defenses.base import Defense, Shares
from mibench.registry import defenses


@defenses.register(
    "noise", servers="1", randomness="fresh per message", paper="He et al., IEEE IoTJ 2020"
)
class Noise(Defense):
    """Fresh Gaussian or Laplace noise on normalised features, in training and in use.

    z = BN(f(x)) + s e, with e of unit variance and s = 10^(-SNR/20). The normalisation has no
    learned gain (batch normalisation without affine part), so the client cannot escape the noise
    by growing its features: their RMS is 1 by construction and s is a noise-to-signal ratio. A
    channel is normalised over the batch and all its places: those of a map (C, h, w), or all tokens
    of a set (N, D), class tokens included.

    He et al. add noise of a given level to a finished model, without a scale, and have no vision
    transformers. Inferred here: the calibration, that the whole model is trained through the noise,
    and that all tokens of a set share one scale.
    """

    class Params(Defense.Params):
        """Law and strength of the noise."""

        law: Literal["gaussian", "laplace"] = "gaussian"
        snr_db: float = Field(
            default=0.0, ge=-40, le=60, description="feature RMS over noise deviation, in dB"
        )

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        shape = split.feature_shape
        self.normalise: nn.Module = (
            nn.BatchNorm2d(shape[0], affine=False) if len(shape) == 3 else TokenNorm(shape[-1])
        )

    @property
    def deviation(self) -> float:
        """Standard deviation s of the noise; the features have RMS 1."""
        return math.pow(10, -self.params.snr_db / 20)

    def predict(self, images: Tensor) -> Shares:
        """Returns the normalised features, without noise."""
        return (self.normalise(self.client(images)),)

    def protect(self, images: Tensor) -> Shares:
        """Returns the normalised features with fresh noise."""
        (clean,) = self.predict(images)
        if self.params.law == "gaussian":
            return (clean + self.deviation * torch.randn_like(clean),)
        # Laplace of unit variance has scale 1/sqrt(2); inverse of its distribution function.
        # In full precision: a draw in bf16 can fall on the ends of the interval, at infinity.
        u = torch.rand_like(clean, dtype=torch.float32) - 0.5
        draw = -u.sign() * torch.log1p(-2 * u.abs().clamp_max(0.5 - 1e-7)) / math.sqrt(2)
        return (clean + self.deviation * draw,)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """Gaussian: -|z - f|^2 / 2s^2. Laplace of scale s/sqrt(2): -sqrt(2) |z - f|_1 / s."""
        residual = (shares[0] - predicted[0]).flatten(1)
        if self.params.law == "gaussian":
            return -residual.square().sum(1) / (2 * self.deviation**2)
        return -math.sqrt(2) * residual.abs().sum(1) / self.deviation


class TokenNorm(nn.BatchNorm1d):
    """Batch normalisation of each channel of tokens (B, N, D), without affine part."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Keeps the shape."""
        return super().forward(tokens.flatten(0, 1)).view_as(tokens)
