"""Additive noise on the features or the image, calibrated to their scale."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mibench.backbones.base import Split
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Facts, Shares
from mibench.defenses.parts.layers import channels_of, per_channel, standardisation
from mibench.defenses.parts.mechanism import gaussian_epsilon, laplace_like
from mibench.registry import defenses
from mibench.training import Step

MEASURED = 1024
"""Training images on which scales are measured."""
CHUNK = 128


@defenses.register(
    "noise", servers="1", randomness="fresh per message", paper="He et al., IEEE IoTJ 2020"
)
class Noise(Defense):
    """Fresh Gaussian or Laplace noise on normalised features, or on the image.

    z = BN(f(x)) + s e, with e of unit variance and s = 10^(-SNR/20). The normalisation has no
    learned gain (batch normalisation without affine part), so the client cannot escape the noise
    by growing its features: their RMS is 1 by construction and s is a noise-to-signal ratio. With
    ``clip``, each message is also scaled down to a norm of at most sqrt(d), d its number of values.
    Two messages then differ by 2 sqrt(d) at most, and one transmission is (epsilon, delta)
    differentially private by the analytic Gaussian mechanism (Balle and Wang, ICML 2018,
    theorem 8), or epsilon by the Laplace mechanism; the record says how large epsilon is.

    With ``place=input`` it is z = BN(f(x + s r e)), r the RMS deviation of the training images from
    their mean colour. No closed form of its law is known. Attacks meet a Gaussian of independent
    values whose mean and deviation per channel were measured on training images.

    He et al. add noise of a given level to a finished model, without a scale, and have no vision
    transformers. Here that is ``training=post_hoc``. Inferred: the calibration, training the whole
    model through the noise, and that all tokens of a set share one scale.
    """

    class Params(Defense.Params):
        """Law, strength and place of the noise."""

        law: Literal["gaussian", "laplace"] = "gaussian"
        snr_db: float = Field(
            default=0.0, ge=-40, le=60, description="RMS of the signal over that of the noise, dB"
        )
        place: Literal["features", "input"] = Field(
            default="features", description="what the noise is added to"
        )
        training: Literal["noise_aware", "post_hoc"] = Field(
            default="noise_aware", description="train through the noise, or add it to a plain model"
        )
        clip: bool = Field(
            default=False, description="bound the norm of each message, for a guarantee"
        )
        delta: float = Field(
            default=1e-5, gt=0, lt=1, description="with clip: the guarantee may fail so often"
        )

        @model_validator(mode="after")
        def _bounded(self) -> Noise.Params:
            if self.clip and self.place == "input":
                raise ValueError("clip bounds features; with place=input leave it out")
            return self

    params: Params
    image_rms: Tensor
    shift: Tensor  # (C, 1, 1) or (D,)
    spread: Tensor

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        shape = split.feature_shape
        self.shape = shape
        self.normalise = standardisation(shape)
        if params.place == "input":
            channels = channels_of(shape)
            self.register_buffer("image_rms", torch.ones(()))
            self.register_buffer("shift", per_channel(torch.zeros(channels), shape))
            self.register_buffer("spread", per_channel(torch.ones(channels), shape))

    @property
    def deviation(self) -> float:
        """Standard deviation s of the noise, where the signal has RMS 1."""
        return math.pow(10, -self.params.snr_db / 20)

    def predict(self, images: Tensor) -> Shares:
        """Returns the normalised features, without noise."""
        z = self.normalise(self.client(images))
        if self.params.clip:
            bound = math.sqrt(math.prod(self.shape))
            norm = z.flatten(1).norm(dim=1).view(-1, *(1,) * (z.ndim - 1))
            z = z * (bound / norm.clamp_min(1e-6)).clamp_max(1)
        return (z,)

    def protect(self, images: Tensor) -> Shares:
        """Returns the normalised features with fresh noise."""
        if self.params.place == "input":
            return self.predict(images + self.image_rms * self._noise(images))
        (clean,) = self.predict(images)
        return (clean + self._noise(clean),)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """Gaussian: -|z - f|^2 / 2s^2. Laplace of scale s/sqrt(2): -sqrt(2) |z - f|_1 / s."""
        residual = shares[0] - predicted[0]
        if self.params.place == "input":
            scaled = (residual - self.shift) / self.spread
            return -scaled.flatten(1).square().sum(1) / 2
        if self.params.law == "gaussian":
            return -residual.flatten(1).square().sum(1) / (2 * self.deviation**2)
        return -math.sqrt(2) * residual.flatten(1).abs().sum(1) / self.deviation

    def training_logits(self, images: Tensor, step: Step) -> Tensor:
        """Through the noise or, post hoc, without."""
        if self.params.training == "post_hoc":
            return self.answer(self.predict(images))
        return super().training_logits(images, step)

    @torch.no_grad()
    def begin(self, phase: str, train: ImageSet) -> None:  # noqa: ARG002
        """Measures the RMS of the training images about their mean colour."""
        if self.params.place == "input":
            images = train.take(MEASURED).images()
            deviation = images - images.mean((0, 2, 3), keepdim=True)
            self.image_rms.copy_(deviation.square().mean().sqrt())

    @torch.no_grad()
    def finish(self, train: ImageSet) -> None:
        """Measures how the noise of the image arrives in the features."""
        if self.params.place != "input":
            return
        device = self.image_rms.device
        changes = []
        for some in train.take(MEASURED).chunks(CHUNK):
            images = some.to(device)
            changes.append(self.protect(images)[0] - self.predict(images)[0])
        change = torch.cat(changes)
        axes = (0, 2, 3) if change.ndim == 4 else (0, 1)
        self.shift.copy_(per_channel(change.mean(axes), self.shape))
        # A dead channel has no deviation, and says nothing of the image.
        self.spread.copy_(per_channel(change.std(axes).clamp_min(1e-3), self.shape))

    def describe(self) -> Facts:
        """With clipping, epsilon of one transmission."""
        if not self.params.clip:
            return {}
        values, delta = math.prod(self.shape), self.params.delta
        farthest = 2 * math.sqrt(values)
        if self.params.law == "gaussian":
            epsilon = gaussian_epsilon(farthest / self.deviation, delta)
            return {"epsilon": epsilon, "delta": delta}
        # In the 1-norm two messages differ by sqrt(d) times as much at most.
        scale = self.deviation / math.sqrt(2)
        return {"epsilon": farthest * math.sqrt(values) / scale, "delta": 0.0}

    def _noise(self, like: Tensor) -> Tensor:
        if self.params.law == "gaussian":
            # Of the shape alone: in the layout of channels-last features a draw is slow on CPUs.
            return self.deviation * torch.randn(like.shape, device=like.device)
        # Laplace of unit variance has scale 1/sqrt(2).
        return self.deviation / math.sqrt(2) * laplace_like(like)
