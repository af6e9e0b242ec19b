"""DISCO: a small network on the client chooses, image by image, the channels that are sent."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.backbones.base import Split
from mibench.data.sets import ImageSet
from mibench.defenses.base import TOLERANCE, Defense, Facts, Shares
from mibench.defenses.parts.layers import channels_of
from mibench.defenses.parts.proxy import ProxyDecoder, adversarial_loss
from mibench.errors import InvalidParamsError
from mibench.registry import defenses
from mibench.training import Losses, Step

TEMPERATURE = 1 / 30
"""Of the soft gate through which the pruner learns."""
HIDDEN = 32
"""Width of the pruner's hidden layer."""


@defenses.register(
    "disco", servers="1", randomness="none", paper="Singh et al., CVPR 2021, arXiv 2012.11025"
)
class Disco(Defense):
    """Dynamic pruning of channels, learned against a proxy decoder.

    z' = g(z) z: a pruner on the client scores the C channels of z = f(x), the ceil((1 - r) C) best
    of this image are sent as they are and all others are exactly 0. With D the proxy decoder and E
    its squared error over the variance of the images,

        min over client and server   L_task,
        min over the pruner          L_task - a E(D(z'), x),
        min over D                   E(D(z'), x).

    Published code multiplies by the soft gate sigmoid((score - threshold) 30), in use too, so that
    dropped channels leak scaled copies. Here the gate is hard forward, in training and in use, and
    the soft one is its gradient only. The threshold lies between the last score that is kept and
    the first that is not.

    Inferred: the pruner. The published one is the rest of a ResNet-18, which would cost the client
    more than its own part; ours is two layers on mean and deviation of each channel, with
    standardised scores. Its input is detached, so that the client learns from the task alone. Left
    out: the paper's spatial decoupling of the input. For tokens, which the paper does not speak of,
    a channel is one of the D values of all tokens of an image.

    What is sent is the dense tensor with its zeros, so the bytes counted are those of all channels;
    kept channels with their numbers would say the same in fewer bytes.
    """

    class Params(Defense.Params):
        """How many channels are dropped, and how hard the pruner plays."""

        ratio: float = Field(default=0.6, gt=0, lt=1, description="r, share of channels dropped")
        adversarial: float = Field(
            default=1.0, ge=0, description="a, weight of the proxy's error in the pruner's loss"
        )

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        self.channels = channels_of(split.feature_shape)
        # Rounding must not turn 0.29 * 100 into 28.
        dropped = int(params.ratio * self.channels + 1e-9)
        if self.channels < 2:
            raise InvalidParamsError(
                "disco drops some channels and sends others, and behind this split point there is "
                "one only; choose another split point."
            )
        if not 0 < dropped < self.channels:
            raise InvalidParamsError(
                f"disco.ratio is {params.ratio}, which drops {dropped} of {self.channels} channels "
                f"of the features; choose a value from {1 / self.channels:.4g} to "
                f"{1 - 1 / self.channels:.4g}."
            )
        self.kept = self.channels - dropped
        self.pruner = Pruner(self.channels)
        self.proxy = ProxyDecoder(split.feature_shape, split.image_shape, split.prefix_tokens)

    def protect(self, images: Tensor) -> Shares:
        """Returns the features, zero in the channels that were dropped."""
        z = self.client(images)
        return (z * self._gate(z),)

    def predict(self, images: Tensor) -> Shares:
        """Returns the features of all channels.

        With the gaps of a guess, an attack would have no gradient in channels that arrived and that
        its guess would drop.
        """
        return (self.client(images),)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """That of a deterministic message, over the channels that arrived."""
        (share,), (guess,) = shares, predicted
        places = (2, 3) if share.ndim == 4 else (1,)
        arrived = (share != 0).any(places, keepdim=True)
        scale = TOLERANCE * share.flatten(1).square().mean(1).sqrt().clamp_min(1e-6)
        residual = (share - guess) * arrived
        return -residual.flatten(1).square().sum(1) / (2 * scale.square())

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:  # noqa: ARG002
        """The task's loss, and the proxy's error with the reversed gradient to the pruner."""
        z = self.client(images)
        gate = self._gate(z)
        return {
            "task": self.task.loss(self.answer((z * gate,)), labels),
            "reconstruction": adversarial_loss(
                self.proxy, z.detach() * gate, images, self.params.adversarial
            ),
        }

    @torch.no_grad()
    def examine(self, images: ImageSet) -> Facts:
        """How many channels are kept, and how many of them for some images only."""
        device = next(self.parameters()).device
        masks = [self._mask(self.pruner(self.client(some.to(device)))) for some in images.chunks()]
        often = torch.cat(masks).mean(0)
        return {
            "channels": self.channels,
            "channels_kept": self.kept,
            "channels_always_kept": int((often == 1).sum()),
            "channels_never_kept": int((often == 0).sum()),
        }

    def client_modules(self) -> Iterable[nn.Module]:
        """Stem and pruner run on the client."""
        return [self.client, self.pruner]

    def _mask(self, scores: Tensor) -> Tensor:
        """Scores (B, C) → 1 for the best of each row, 0 for the others."""
        best = scores.topk(self.kept, dim=1).indices
        return torch.zeros_like(scores).scatter_(1, best, 1.0)

    def _gate(self, z: Tensor) -> Tensor:
        """The mask, laid out as z; backward, the soft gate."""
        scores = self.pruner(z.detach())
        around = scores.detach().topk(self.kept + 1, dim=1).values[:, -2:]
        threshold = around.mean(1, keepdim=True)
        soft = ((scores - threshold) / TEMPERATURE).sigmoid()
        return _broadcast(self._mask(scores) + (soft - soft.detach()), z)


class Pruner(nn.Module):
    """Mean and deviation of each channel → a score for each channel.

    An image's scores have mean 0 and deviation 1. Left free, they grow until no gate is near its
    threshold, and the pruner stops learning.

    Args:
        channels: C of maps, D of tokens.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.BatchNorm1d(2 * channels, affine=False),
            nn.Linear(2 * channels, HIDDEN),
            nn.ReLU(),
            nn.Linear(HIDDEN, channels),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Maps (B, C, h, w) or tokens (B, N, C) → scores (B, C)."""
        places = (2, 3) if z.ndim == 4 else (1,)
        scores: Tensor = self.network(
            torch.cat([z.mean(places), z.std(places, correction=0)], dim=1)
        )
        return F.layer_norm(scores.float(), scores.shape[1:])


def _broadcast(mask: Tensor, z: Tensor) -> Tensor:
    """Lays a mask (B, C) out over maps (B, C, h, w) or tokens (B, N, C)."""
    return mask[:, :, None, None] if z.ndim == 4 else mask[:, None]
