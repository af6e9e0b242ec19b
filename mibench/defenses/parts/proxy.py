"""The proxy attacker of adversarial training, and the reversal that sets the client against it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.backbones.residual import ResidualBlock
from mibench.backbones.tokens import to_map


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Tensor) -> Tensor:
        # Not save_for_backward, which forbids that the weights change on the way.
        ctx.weights = weights
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return -gradient * ctx.weights.view(-1, *(1,) * (gradient.ndim - 1)), None


def reversed_gradient(z: Tensor, weights: Tensor) -> Tensor:
    """The same values; backward, each row's gradient times minus its weight.

    What lies behind it minimises a loss and what lies before it maximises that loss, in one step of
    one optimiser (Ganin and Lempitsky, 2015).

    Args:
        z: (B, ...).
        weights: (B,), read when the gradient arrives.
    """
    reversed_z: Tensor = _Reversal.apply(z, weights)
    return reversed_z


class ProxyDecoder(nn.Module):
    """A small inverse network that learns beside the defense: shares → image.

    Its input is normalised without a learned gain, so that shrinking features does not look
    private. Class tokens are told to every place, so that they are no way around it. Weaker than
    the attacks, and of another architecture: a defense is never scored by it.

    Args:
        shape: maps (C, h, w), or tokens (N, D) on their grid.
        image_shape: (3, H, W).
        prefix: leading tokens that stand for no place of the image.
        width: channels of the residual blocks.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        image_shape: tuple[int, int, int],
        prefix: int = 0,
        width: int = 48,
    ) -> None:
        super().__init__()
        self.prefix, self.image_shape = prefix, image_shape
        channels, height = self._arranged(torch.zeros(1, *shape)).shape[1:3]
        self.factor = max(1, image_shape[1] // height)
        self.network = nn.Sequential(
            nn.BatchNorm2d(channels, affine=False),
            ResidualBlock(channels, width),
            ResidualBlock(width, width),
            nn.Conv2d(width, image_shape[0] * self.factor**2, 3, padding=1),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Returns images (B, 3, H, W) in (0, 1)."""
        rough = F.pixel_shuffle(self.network(self._arranged(z)), self.factor).sigmoid()
        if rough.shape[2:] != self.image_shape[1:]:
            rough = F.interpolate(rough, self.image_shape[1:], mode="bilinear")
        return rough

    def _arranged(self, z: Tensor) -> Tensor:
        maps = to_map(z, self.prefix)
        if not self.prefix:
            return maps
        told = z[:, : self.prefix].flatten(1)[..., None, None]
        return torch.cat([maps, told.expand(-1, -1, *maps.shape[2:])], dim=1)


def unexplained(rebuilt: Tensor, images: Tensor) -> Tensor:
    """Squared error of each image over the variance of the images, (B,).

    On average 1 is the mean image, which takes no message to guess; 0 is a perfect reconstruction.

    Args:
        rebuilt: (B, 3, H, W), or one image (3, H, W) for all.
        images: (B, 3, H, W).
    """
    rebuilt, images = rebuilt.float(), images.float()
    error = (rebuilt - images).square().flatten(1).mean(1)
    return error / (images - images.mean(0)).square().mean().clamp_min(1e-6)


def push(errors: Tensor, images: Tensor) -> Tensor:
    """How much of the client's push is left for each image, in [0, 1].

    All of it up to the error of the mean image, nothing from twice that error on: beyond, the error
    could grow without bound, and nothing would be gained for privacy. It fades out in between, so
    that a decoder that has learned nothing yet does not silence the client.

    Args:
        errors: (B,), see `unexplained`.
        images: (B, 3, H, W).
    """
    without_message = unexplained(images.mean(0), images).clamp_min(1e-6)
    return (2 - errors.detach() / without_message).clamp(0, 1)


def adversarial_loss(decoder: nn.Module, z: Tensor, images: Tensor, weight: float) -> Tensor:
    """The unexplained share of the images' variance: min over the decoder, max over the client.

    Args:
        decoder: shares → images.
        z: what is sent, differentiable in the client.
        images: (B, 3, H, W) in [0, 1].
        weight: of the client's side, while it has any `push`; the decoder's own is 1.

    Returns:
        Scalar: the decoder's loss.
    """
    weights = torch.full((len(z),), weight, device=z.device)
    errors = unexplained(decoder(reversed_gradient(z, weights)), images)
    # The reversal reads its weights when the gradient comes back through it.
    weights.mul_(push(errors, images))
    return errors.mean()
