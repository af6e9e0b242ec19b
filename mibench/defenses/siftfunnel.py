"""SiftFunnel: a narrow edge network with attention, trained against its own correlations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.backbones.base import Normalise, Split
from mibench.backbones.tokens import to_map
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Facts, Shares
from mibench.defenses.parts.attention import CBAM, SqueezeExcite, TripletAttention
from mibench.defenses.parts.dependence import distance_correlation
from mibench.defenses.parts.layers import channels_of
from mibench.errors import InvalidParamsError
from mibench.metrics.cost import client_cost, count_parameters
from mibench.registry import defenses
from mibench.task import Attributes
from mibench.training import Losses, Step

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""Of CIFAR-10; the released code takes them for all colour images."""
FULL_SIDE = 64
"""Side of the paper's images; for smaller ones the stem is half as wide."""
LEAST_SIDE = 8
"""Below it a map that is sent has one place, over which nothing can be correlated."""
TOKEN_CHANNELS = 12
EPSILON = 1e-8
"""Added to a variance before its root. z deviates by some hundredths: a larger one could be cheated
by shrinking z, which the cloud's batch normalisation undoes."""
COARSE_SIDE = 8
"""Pixels a side, at most, of the image that ``linear=input`` correlates with."""
CONSTANT = 1e-6
"""Deviation below which a channel counts as dead."""
EXAMINED, EXAMINED_VALUES = 1024, 2**26
"""Images that are examined at most, and their pixels together."""
CHUNK = 128

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


@defenses.register(
    "siftfunnel", servers="1", randomness="none", paper="Liu et al., arXiv 2501.00824"
)
class SiftFunnel(Defense):
    """A funnel-shaped edge network sends few channels that depend little on the image.

        L = alpha KL(y_s || p) + beta dCor^2(x, z) + 0.03 mean|z| + gamma P(z)

    as the released code has it, not the paper's words. y_s gives the true class 1 - s and every
    other s/(C-1); p is the softmax of the logits; x is the augmented, normalised image and z what
    is sent. dCor^2 is the squared distance correlation of the batch, the biased estimate (the
    paper's non-linear correlation, there called mutual information). P is the squared Pearson
    correlation of two channels of z over the places of one image, averaged over all c^2 pairs, the
    diagonal included; it never looks at x, and a channel that is switched off lowers it. mean|z| is
    what the code logs as entropy. Edge and cloud are trained jointly from scratch.

    Minimised is L / alpha, whose minimum is the same. A factor means nothing to the Adam of the
    released code, but with SGD alpha = 5 is five times the protocol's learning rate: z collapsed in
    two of six short trainings, and the control that trains the edge for the task alone would learn
    at another rate.

    The edge replaces the backbone's client. The three of the paper send maps of 12 x H/4 x W/4
    (``cnn``), 6 x H/2 x W/2 (``resnet``) and 4 x H/4 x W/4 (``vgg``). The cloud expands their
    channels (two 3x3 convolutions, batch normalisation, ReLU), applies triplet attention, and goes
    on with the split's own server, which reads the coarser map.

    Ours: at sizes other than 64 pixels the released networks do not fit; pools and strides stay,
    and below 64 pixels the widths of 64 and 128 are halved. Unused layers of the released ResNet
    are left out. Layers begin with weights that keep the scale of their input and without bias, and
    gates with hidden units that are all alive: in a chain of five convolutions without
    normalisation, PyTorch's default leaves an untrained z almost constant over images. For
    attributes, each counts as a classification of C = 2 classes. ``linear=input`` is our reading
    of the paper's sentence that the linear correlation of input and features is constrained, see
    `input_correlation`. Vision transformers, which the paper does not speak of, keep their client,
    and a funnel of linear layers with gates on channels brings each token, class tokens included,
    down to 12 values; the cloud has two linear layers and layer normalisation in front.
    """

    class Params(Defense.Params):
        """Which edge, and the weights of the loss."""

        edge: Literal["cnn", "resnet", "vgg"] = Field(
            default="cnn", description="network that replaces a client that sends maps"
        )
        alpha: float = Field(default=5.0, gt=0, description="weight of the smoothed KL divergence")
        beta: float = Field(
            default=2.0, ge=0, description="weight of the distance correlation of image and z"
        )
        gamma: float = Field(default=2.0, ge=0, description="weight of the linear correlation")
        sparsity: float = Field(default=0.03, ge=0, description="weight of the mean of |z|")
        smoothing: float = Field(
            default=0.25, ge=0, lt=0.5, description="s, probability of all wrong classes together"
        )
        dcor: Literal["biased", "unbiased"] = Field(
            default="biased", description="estimate of the distance correlation"
        )
        linear: Literal["channels", "input"] = Field(
            default="channels",
            description="linear correlation between channels of z (as released), or of z with the "
            "image (as written)",
        )

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        self.prefix = split.prefix_tokens
        self.normalise = Normalise(MEAN, STD)
        self.example_shape = (1, *split.image_shape)
        plain = self._edge_cost()
        channels = channels_of(split.feature_shape)
        if len(split.feature_shape) == 3:
            least = min(split.image_shape[1:])
            if least < LEAST_SIDE:
                raise InvalidParamsError(
                    f"siftfunnel halves images twice, and those of {least} pixels are too small; "
                    f"take an image size of {LEAST_SIDE} at least."
                )
            build, sent = EDGES[params.edge]
            self.client = nn.Sequential(
                Normalise(MEAN, STD), *build(1 if least >= FULL_SIDE else 2)
            )
            self.server = nn.Sequential(_expansion(sent, channels), self.server)
            self._refuse_misfit(split)
        else:
            if params.edge != "cnn":
                raise InvalidParamsError(
                    f"siftfunnel.edge is {params.edge!r}, but backbone {split.backbone.name} sends "
                    "tokens, for which there is one edge only; leave 'edge' out, or take a "
                    "backbone that sends maps, such as small-resnet."
                )
            if split.feature_shape[0] - self.prefix < 2:
                raise InvalidParamsError(
                    f"siftfunnel: backbone {split.backbone.name} sends one token of the image, and "
                    "the linear term is over several; take a smaller patch."
                )
            self.client = nn.Sequential(self.client, _token_funnel(channels))
            self.server = nn.Sequential(_token_expansion(channels), self.server)
        self.costs = (*self._edge_cost(), *plain)

    def protect(self, images: Tensor) -> Shares:
        """Returns z, maps (B, c, h, w) or tokens (B, N, 12)."""
        return (self.client(images),)

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:  # noqa: ARG002
        """The weighted terms of L, all divided by alpha; a term of weight 0 is left out."""
        own = self.params
        (z,) = shares = self.protect(images)
        x = self.normalise(images)
        terms = {"task": self._divergence(self.answer(shares), labels)}
        if own.beta:
            dependence = distance_correlation(x, z, unbiased=own.dcor == "unbiased")
            terms["distance"] = own.beta / own.alpha * dependence
        if own.sparsity:
            terms["sparsity"] = own.sparsity / own.alpha * z.float().abs().mean()
        if own.gamma:
            between = own.linear == "channels"
            linear = channel_correlation(z, self.prefix) if between else input_correlation(x, z)
            terms["linear"] = own.gamma / own.alpha * linear
        return terms

    def describe(self) -> Facts:
        """Multiply-adds and parameters of the edge, and of the client that it replaced.

        The abstract of v7 claims a factor of about 20 and does not say against which client.
        """
        macs, parameters, plain_macs, plain_parameters = self.costs
        return {
            "edge_macs": macs,
            "edge_parameters": parameters,
            "plain_edge_macs": plain_macs,
            "plain_edge_parameters": plain_parameters,
            "mac_reduction": plain_macs / macs,
        }

    def examine(self, images: ImageSet) -> Facts:
        """How much of z is in use, and both estimates of its distance correlation with the image.

        The biased estimate was trained on and is no measure of leakage; see
        `distance_correlation`.
        """
        pixels = images.images(slice(0, 1)).numel()
        some = images.take(min(EXAMINED, EXAMINED_VALUES // pixels))
        (z,) = self.transmit(some, CHUNK, seed=0)
        device = next(self.parameters()).device
        x = torch.cat([self.normalise(part.to(device)).cpu() for part in some.chunks(CHUNK)])
        channels = by_channel(z)
        return {
            "examined_images": len(some),
            "channels": len(channels),
            "dead_channels": int((channels.std(1) < CONSTANT).sum()),
            "nonzero_share": (z != 0).float().mean().item(),
            "effective_rank": effective_rank(z),
            "dcor_biased": distance_correlation(x, z).item(),
            "dcor_unbiased": distance_correlation(x, z, unbiased=True).item(),
        }

    def _divergence(self, logits: Tensor, labels: Tensor) -> Tensor:
        """KL(y_s || p) = H(y_s, p) - H(y_s), whatever smoothing the recipe has."""
        s = self.params.smoothing
        ways = 2 if isinstance(self.task, Attributes) else self.task.outputs
        # A task spreads its smoothing over all classes, the true one included.
        cross = self.task.smoothed(s * ways / (ways - 1)).loss(logits.float(), labels)
        wanted = torch.tensor([1 - s, *[s / (ways - 1)] * (ways - 1)], device=cross.device)
        divergence: Tensor = cross - torch.special.entr(wanted).sum()
        return divergence

    def _edge_cost(self) -> tuple[int, int]:
        """Multiply-adds for one image and parameters of the client as it is now."""
        example = torch.zeros(self.example_shape)
        flops = client_cost(self.client.eval(), example)
        self.client.train()
        return flops // 2, count_parameters([self.client])

    @torch.no_grad()
    def _refuse_misfit(self, split: Split) -> None:
        self.eval()
        sent = self.client(torch.zeros(self.example_shape))
        try:
            self.server(sent)
        except RuntimeError as error:
            given, wanted = ("x".join(map(str, s[-2:])) for s in (sent.shape, split.feature_shape))
            raise InvalidParamsError(
                f"siftfunnel.edge {self.params.edge!r} sends maps of {given}, but behind this "
                f"split point backbone {split.backbone.name} reads {wanted} only; take a split "
                f"point or an edge with maps of equal size (cnn and vgg send H/4 x W/4, resnet "
                "H/2 x W/2), or a backbone that reads any size, such as small-resnet."
            ) from error
        self.train()


def channel_correlation(z: Tensor, prefix: int = 0) -> Tensor:
    """P(z): mean squared Pearson correlation of two channels over the places of an image.

    The covariance is divided by the number m of places and the deviations by m - 1, as in the
    released code, so a channel's square with itself is ((m-1)/m)^2. Constant channels count as 0.

    Args:
        z: maps (B, c, h, w) or tokens (B, N, c), with two places at least.
        prefix: leading tokens that stand for no place; left out.

    Returns:
        Scalar in [0, 1).
    """
    with torch.autocast(z.device.type, enabled=False):
        channels = to_map(z, prefix).float().flatten(2)
        centred = channels - channels.mean(2, keepdim=True)
        covariance = centred @ centred.transpose(1, 2) / channels.shape[2]
        deviation = (channels.var(2) + EPSILON).sqrt()
        scale = deviation[:, :, None] * deviation[:, None]
        return (covariance / scale).square().mean()


def input_correlation(x: Tensor, z: Tensor) -> Tensor:
    """Mean squared Pearson correlation over the batch, of each value of z with each coarse pixel.

    Independent data give 1/(B-1), constant values 0.

    Args:
        x: images (B, 3, H, W), averaged down to `COARSE_SIDE` pixels a side at most.
        z: (B, ...).

    Returns:
        Scalar in [0, 1).
    """
    with torch.autocast(z.device.type, enabled=False):
        height, width = (min(COARSE_SIDE, side) for side in x.shape[2:])
        coarse = F.adaptive_avg_pool2d(x.float(), (height, width))
        scaled = []
        for sample in (z.float().flatten(1), coarse.flatten(1)):
            deviation = (sample.var(0, correction=0) + EPSILON).sqrt()
            scaled.append((sample - sample.mean(0)) / deviation)
        return (scaled[0].T @ scaled[1] / len(x)).square().mean()


def by_channel(z: Tensor) -> Tensor:
    """Values of each channel over images and places: maps or tokens → (c, B * places)."""
    return z.movedim(1 if z.ndim == 4 else 2, 0).flatten(1)


def effective_rank(z: Tensor) -> float:
    """Exponential of the entropy of the normalised eigenvalues of the channels' covariance.

    1 if all channels say the same, c if they are uncorrelated and equally strong, 0 if all are
    constant.
    """
    eigenvalues = torch.linalg.eigvalsh(torch.cov(by_channel(z.float())).double()).clamp_min(0)
    total = eigenvalues.sum()
    if total == 0:
        return 0.0
    return float(torch.special.entr(eigenvalues / total).sum().exp())


def _keeping_scale(layer: Layer) -> Layer:
    nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return _keeping_scale(nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2))


def _conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    return [_conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU()]


def _attention(channels: int, reduction: int) -> list[nn.Module]:
    return [SqueezeExcite(channels, reduction), TripletAttention()]


def _spout(inputs: int, sent: int, reduction: int, ratio: int) -> list[nn.Module]:
    """The end of each edge: five convolutions with one activation between, and gates."""
    return [
        _conv(inputs, sent, 1),
        _conv(sent, sent, 3),
        nn.SiLU(),
        _conv(sent, sent, 1),
        _conv(sent, sent, 3),
        _conv(sent, sent, 5),
        nn.ReLU(),
        SqueezeExcite(sent, reduction),
        CBAM(sent, ratio),
    ]


def _cnn_edge(narrower: int) -> list[nn.Module]:
    wide = 64 // narrower
    return [
        _conv(3, wide, 3),
        nn.BatchNorm2d(wide),
        nn.MaxPool2d(2),
        nn.ReLU(),
        *_attention(wide, 32 // narrower),
        *_conv_bn_relu(wide, 16, kernel=1),
        nn.MaxPool2d(2),
        *_spout(16, 12, reduction=4, ratio=6),
    ]


def _resnet_edge(narrower: int) -> list[nn.Module]:
    wide, wider = 64 // narrower, 128 // narrower
    return [
        *_conv_bn_relu(3, wide),
        *_attention(wide, 16 // narrower),
        *_conv_bn_relu(wide, wider, stride=2),
        *_conv_bn_relu(wider, wider),
        *_attention(wider, 32 // narrower),
        *_conv_bn_relu(wider, 32, kernel=1),
        *_spout(32, 6, reduction=3, ratio=3),
    ]


def _vgg_edge(narrower: int) -> list[nn.Module]:
    wide, wider = 64 // narrower, 128 // narrower
    return [
        *_conv_bn_relu(3, wide),
        *_conv_bn_relu(wide, wide),
        nn.MaxPool2d(2),
        *_attention(wide, 16 // narrower),
        *_conv_bn_relu(wide, wider),
        *_conv_bn_relu(wider, wider),
        nn.MaxPool2d(2),
        *_attention(wider, 32 // narrower),
        *_conv_bn_relu(wider, 32),
        *_spout(32, 4, reduction=4, ratio=4),
    ]


EDGES: dict[str, tuple[Callable[[int], list[nn.Module]], int]] = {
    "cnn": (_cnn_edge, 12),
    "resnet": (_resnet_edge, 6),
    "vgg": (_vgg_edge, 4),
}
"""Builder of each edge, which is told by how much to narrow the stem, and channels it sends."""


def _expansion(sent: int, channels: int) -> nn.Sequential:
    """The cloud's first layers for maps: more channels, not more places."""
    return nn.Sequential(
        _keeping_scale(nn.Conv2d(sent, channels, 3, padding=1, bias=False)),
        _keeping_scale(nn.Conv2d(channels, channels, 3, padding=1, bias=False)),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        TripletAttention(),
    )


def _token_funnel(channels: int) -> nn.Sequential:
    sent, neck = TOKEN_CHANNELS, 16
    return nn.Sequential(
        _keeping_scale(nn.Linear(channels, neck)),
        nn.LayerNorm(neck),
        nn.ReLU(),
        SqueezeExcite(neck, 8),
        _keeping_scale(nn.Linear(neck, sent)),
        nn.SiLU(),
        _keeping_scale(nn.Linear(sent, sent)),
        nn.ReLU(),
        SqueezeExcite(sent, 4),
    )


def _token_expansion(channels: int) -> nn.Sequential:
    return nn.Sequential(
        _keeping_scale(nn.Linear(TOKEN_CHANNELS, channels, bias=False)),
        _keeping_scale(nn.Linear(channels, channels, bias=False)),
        nn.LayerNorm(channels),
    )
