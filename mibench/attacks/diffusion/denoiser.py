"""The noise predictor that every diffusion attack samples with, in pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def straight_through_clamp(x: Tensor) -> Tensor:
    """Clamps to [-1, 1] and passes the gradient as if it had not: a cut gradient guides nowhere."""
    return x + (x.clamp(-1, 1) - x).detach()


class Prior(nn.Module):
    """A noise predictor eps(x_t, t) with its noise schedule (Ho et al., arXiv 2006.11239).

    A state x is what is noised and denoised. Here it is the image in [-1, 1], as in the paper; a
    subclass may hold states of another kind and then overrides `encode`, `decode` and `confine`.
    With ``patch`` f the UNet works on f x f pixel patches folded into channels, which makes it
    several times faster on small images.

    Attributes:
        signal: cumulative products abar_t, (T,); x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.
        timesteps: T.
    """

    signal: Tensor

    def __init__(self, unet: nn.Module, scheduler: Any, patch: int) -> None:
        super().__init__()
        self.unet = unet
        self.scheduler = scheduler
        self.patch = patch
        self.timesteps = int(scheduler.config.num_train_timesteps)
        self.register_buffer("signal", scheduler.alphas_cumprod.clone().float())

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """Predicts the noise in states ``noisy`` (B, ...) at ``timestep`` (B,)."""
        folded = F.pixel_unshuffle(noisy, self.patch)
        return F.pixel_shuffle(self.unet(folded, timestep).sample, self.patch)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → states."""
        return 2 * images - 1

    def decode(self, states: Tensor) -> Tensor:
        """States → images (B, 3, H, W) around [-1, 1], differentiably."""
        return states

    def confine(self, states: Tensor) -> Tensor:
        """Moves states to where states of images can be; the gradient passes."""
        return straight_through_clamp(states)

    def working_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """Shape that says how much memory an image of ``image_shape`` takes, see `budget`."""
        return image_shape

    def add_noise(self, states: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """Returns x_t for clean states."""
        signal = self.signal[timestep].to(states.dtype).view(-1, 1, 1, 1)
        return signal.sqrt() * states + (1 - signal).sqrt() * noise

    @torch.no_grad()
    def images(self, states: Tensor) -> Tensor:
        """States → images (B, 3, H, W) in [0, 1]."""
        return ((self.decode(states) + 1) / 2).clamp(0, 1)
