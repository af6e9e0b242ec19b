"""Latent diffusion as a prior: Stable Diffusion with the empty prompt (arXiv 2112.10752)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mibench.attacks.diffusion.denoiser import Prior

MEMORY = 4
"""Values that a latent prior holds per pixel of its VAE, against a denoiser of pixels."""


class LatentPrior(Prior):
    """A noise predictor on the latents of a VAE, with the empty prompt and no guidance by it.

    Images of the attack are resized to the VAE's size on the way in (`encode` takes the mode of the
    posterior, as DRAG does) and back on the way out, so guidance goes through the VAE's decoder and
    the resizing. Latents have no range: `confine` leaves them.

    Args:
        unet: predicts noise from latents, timestep and prompt.
        vae: between images and latents.
        scheduler: the noise schedule.
        prompt: embedding of the empty prompt, (1, tokens, D).
        image_shape: (3, H, W) of the attack's images.
        side: pixels a side that the VAE works on.
    """

    prompt: Tensor

    def __init__(
        self,
        unet: nn.Module,
        vae: Any,
        scheduler: Any,
        prompt: Tensor,
        image_shape: tuple[int, int, int],
        side: int,
    ) -> None:
        super().__init__(unet, scheduler, patch=1)
        self.vae = vae
        self.size = image_shape[1:]
        self.side = side
        self.scaling = float(vae.config.scaling_factor)
        self.shift = float(vae.config.shift_factor or 0.0)
        self.register_buffer("prompt", prompt.float())

    def forward(self, noisy: Tensor, timestep: Tensor) -> Tensor:
        """Predicts the noise in latents (B, C, h, w)."""
        prompt = self.prompt.expand(len(noisy), -1, -1)
        predicted: Tensor = self.unet(noisy, timestep, encoder_hidden_states=prompt).sample
        return predicted

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] → latents, the mode of the VAE's posterior."""
        large = _resized(2 * images - 1, (self.side, self.side))
        latents: Tensor = self.vae.encode(large).latent_dist.mode()
        return (latents - self.shift) * self.scaling

    def decode(self, states: Tensor) -> Tensor:
        """Latents → images (B, 3, H, W) around [-1, 1], differentiably."""
        large: Tensor = self.vae.decode(states / self.scaling + self.shift).sample
        return _resized(large, self.size)

    def confine(self, states: Tensor) -> Tensor:
        """Latents have no range."""
        return states

    def working_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
        """That of the VAE's images, whatever is attacked."""
        return (MEMORY, image_shape[0], self.side, self.side)


def _resized(images: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(images.shape[2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", antialias=True, align_corners=False)
