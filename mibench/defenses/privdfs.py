"""PrivDFS: distributed feature sharing over servers that never exchange activations."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.backbones.base import Split
from mibench.backbones.tokens import to_map
from mibench.defenses.base import Defense, Facts, Shares
from mibench.errors import InvalidParamsError
from mibench.registry import defenses
from mibench.training import Losses, Step

FREEZE = 0.5
"""Share of the training after which the masks stay as they are."""
REASSIGN_EVERY = 10
"""Training steps between two assignments of units to shares while the masks are learned."""
MASK_GAIN = 10.0
"""Scale of the mask logits: with it, the model's learning rate moves them as fast as weights."""
LEAKAGE_IMAGES = 64
"""Images of a batch on which the leakage term is computed."""
LEAKAGE_PLACES = 32
"""Places a side of a share that the leakage term looks at; a finer share is thinned out."""
LEAKAGE_BLOCK = 32
"""Side of the pixel block of one place; larger blocks are averaged down to it."""
RIDGE = 1e-3
"""Penalty of the closed-form proxy attacker, relative to the mean variance of its inputs."""


@defenses.register("privdfs", servers="K", randomness="none", paper="PrivDFS v2, arXiv 2508.04346")
class PrivDFS(Defense):
    """Learnable binary masks cut the features into sparse shares, one per server.

    The client computes the features of a shallow split, a static mask m_k in {0,1}^M chooses the n
    units that server k receives, each server runs a branch of its own on its share and replies with
    class scores, and a small fusion network on the client turns the K replies into the prediction.
    Shares never overlap, all hold exactly n units, and only kept entries are sent.

    A *unit* is one channel at one phase of a grid of period p: the feature map (C, H, W) becomes
    C p^2 maps of (H/p, W/p). p = 1 masks channels, p = H masks single elements, and in between a
    share stays a compact map that convolutions can read. The tokens of a vision transformer are
    laid out on their grid, as the map (D, g, g), and cut like any map.

    From the abstract of v2: learnable binary masks, sparse and largely non-overlapping shares, a
    branch per server, a light fusion of the branches' predictions on the client. Inferred here,
    since the rest is not public: K, granularity and density; that a branch may reply an embedding
    beside its class scores (off by default); mask logits with a drop slot, trained
    with straight-through gradients and a greedy assignment that makes sizes equal and overlap zero;
    masks learned in the first half of the training and frozen after it; the loss

        L = CE(fused) + b mean_k CE(branch_k) + l max_k R2_k,

    where R2_k is the share of the image's variance that the best linear decoder of share k explains
    (a ridge regression in closed form on the batch, from 3x3 neighbourhoods of the share to the
    pixels below it). Without that term masks have no reason to prefer one unit over another. For
    vision transformers, which the abstract does not speak of, also: the units of a token grid; that
    class tokens are not sent, so that each branch pools its own share; and that the leakage term of
    large images is that of a thinned-out one, see `explained_variance`.
    """

    class Params(Defense.Params):
        """Number and size of the shares, and the weights of the loss."""

        servers: int = Field(default=4, ge=2, le=64, description="K, number of servers")
        density: float = Field(
            default=0.0625, gt=0, le=1, description="share of all features that one server receives"
        )
        period: int = Field(default=2, ge=1, description="p, grid period of a unit; 1 is a channel")
        width: int = Field(default=48, ge=4, description="channels of a branch's first stage")
        embedding: int = Field(
            default=0, ge=0, description="values that a branch replies beside its class scores"
        )
        branch: float = Field(default=0.3, ge=0, description="b, weight of the branches' own loss")
        leakage: float = Field(default=0.3, ge=0, description="l, weight of the leakage term")
        learned: bool = Field(default=True, description="false keeps random masks, as a control")

    params: Params
    assignment: Tensor  # (K, n) unit indices

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        self.prefix = split.prefix_tokens
        example = to_map(torch.zeros(1, *split.feature_shape), self.prefix)
        channels, height, width = example.shape[1:]
        p, k = params.period, params.servers
        if height % p or width % p:
            raise InvalidParamsError(
                f"privdfs.period is {p}, which does not divide the feature map of "
                f"{height}x{width}; choose a divisor."
            )
        self.units = channels * p * p
        self.unit_shape = (height // p, width // p)
        self.kept = max(1, round(params.density * self.units))
        if k * self.kept > self.units:
            raise InvalidParamsError(
                f"privdfs: {k} servers with density {params.density} need {k * self.kept} units, "
                f"but there are {self.units}; shares do not overlap, so density can be at most "
                f"{1 / k:.4g}."
            )
        del self.server  # every server has a branch of its own instead
        self.logits = nn.Parameter(0.01 * torch.randn(k * self.units))
        # First layer of every branch, with a column for each unit it might receive.
        self.embed = nn.Parameter(torch.randn(k, params.width, self.units) / self.kept**0.5)
        shape = (params.width, *self.unit_shape)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(params.width),
                split.branch(shape, split.classes + params.embedding, params.width),
            )
            for _ in range(k)
        )
        self.classes = split.classes
        replied = k * (split.classes + params.embedding)
        self.fusion = nn.Sequential(
            nn.LayerNorm(replied),
            nn.Linear(replied, 64),
            nn.ReLU(),
            nn.Linear(64, split.classes),
        )
        self.register_buffer("assignment", torch.zeros(k, self.kept, dtype=torch.int64))
        self._assign()
        self.first_assignment = self.assignment.clone()

    @property
    def servers(self) -> int:
        """K."""
        return self.params.servers

    def protect(self, images: Tensor) -> Shares:
        """Returns K shares (B, n, H/p, W/p) of kept entries only."""
        units = self._unit_maps(images)
        return tuple(units[:, kept] for kept in self.assignment)

    def serve(self, index: int, share: Tensor) -> Tensor:
        """Branch ``index``: share (B, n, H/p, W/p) → class scores (B, classes), and embedding."""
        weight = self.embed[index][:, self.assignment[index], None, None]
        reply: Tensor = self.branches[index](F.conv2d(share, weight))
        return reply

    def fuse(self, replies: tuple[Tensor, ...]) -> Tensor:
        """Fusion network on the client over the K replies."""
        fused: Tensor = self.fusion(torch.cat(replies, dim=1))
        return fused

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:
        """CE of the fused prediction, of the branches, and the worst share's linear leakage."""
        learning = self.params.learned and step.progress < FREEZE
        units = self._unit_maps(images)
        if learning:
            if step.index % REASSIGN_EVERY == 0:
                self._assign()
            masks = self._straight_through()
            shares = tuple(
                units[:, kept] * mask[kept, None, None]
                for mask, kept in zip(masks, self.assignment, strict=True)
            )
            # Masking the first layer's weights is masking its input, and much cheaper; dropped
            # units take part, so that gradients tell what they would be worth.
            weight = (self.embed * masks[:, None]).flatten(0, 1)
            embedded = F.conv2d(units, weight[..., None, None]).chunk(self.servers, dim=1)
            replies = tuple(
                branch(part) for branch, part in zip(self.branches, embedded, strict=True)
            )
        else:
            shares = tuple(units[:, kept] for kept in self.assignment)
            replies = tuple(self.serve(k, share) for k, share in enumerate(shares))
        terms = {"task": self.task.loss(self.fuse(replies), labels)}
        if self.params.branch:
            scores = [reply[:, : self.classes] for reply in replies]
            own = torch.stack([self.task.loss(score, labels) for score in scores])
            terms["branch"] = self.params.branch * own.mean()
        if self.params.leakage:
            some = slice(0, LEAKAGE_IMAGES)
            explained = torch.stack(
                [explained_variance(share[some], images[some]) for share in shares]
            )
            terms["leakage"] = self.params.leakage * explained.max()
        return terms

    def describe(self) -> Facts:
        """Size of the shares against the image, and how many units the learning has moved."""
        first = [set(row.tolist()) for row in self.first_assignment]
        moved = [
            len(set(row.tolist()) - one) for row, one in zip(self.assignment, first, strict=True)
        ]
        height, width = self.unit_shape
        return {
            "units": self.units,
            "units_per_share": self.kept,
            "values_per_share": self.kept * height * width,
            "units_moved": moved,
        }

    def client_modules(self) -> Iterable[nn.Module]:
        """Stem and fusion run on the client."""
        return [self.client, self.fusion]

    def _unit_maps(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(to_map(self.client(images), self.prefix), self.params.period)

    def _straight_through(self) -> Tensor:
        """Masks (K, M): exactly 0 or 1 forward, gradients of the soft assignment backward."""
        logits = MASK_GAIN * self.logits.view(self.servers, self.units)
        drop = torch.zeros_like(logits[:1])
        soft = torch.cat([logits, drop]).softmax(0)[:-1]
        hard = torch.zeros_like(soft).scatter_(1, self.assignment, 1.0)
        return hard + (soft - soft.detach())

    @torch.no_grad()
    def _assign(self) -> None:
        """Gives every share its n units: best logits first, no unit twice, no share too large."""
        order = self.logits.argsort(descending=True).tolist()
        taken: set[int] = set()
        shares: list[list[int]] = [[] for _ in range(self.servers)]
        for place in order:
            share, unit = divmod(place, self.units)
            if unit not in taken and len(shares[share]) < self.kept:
                shares[share].append(unit)
                taken.add(unit)
        chosen = torch.tensor([sorted(share) for share in shares])
        self.assignment.copy_(chosen)


def explained_variance(share: Tensor, images: Tensor) -> Tensor:
    """Share of the images' variance that the best local linear decoder explains, in [0, 1].

    Its cost is bounded by that of images of 32 pixels: of a finer share every s-th place a side is
    looked at, and images are averaged down where a place stands for a larger block of pixels than
    `LEAKAGE_BLOCK`, or for a fraction of pixels.

    Args:
        share: (B, n, h, w).
        images: (B, 3, H, W). Location (i, j) of the share, with its 3x3 neighbourhood (alone where
            h < 4), decodes the block of pixels that it stands for.

    Returns:
        Scalar, differentiable in the share: explained by the ridge fit on these very images, so it
        is too high where a share has many values and the batch few locations.
    """
    with torch.autocast(share.device.type, enabled=False):
        height, width = share.shape[2:]
        block = min(max(images.shape[-1] // width, 1), LEAKAGE_BLOCK)
        if images.shape[2:] != (height * block, width * block):
            images = F.adaptive_avg_pool2d(images, (height * block, width * block))
        # A linear decoder does not care about scale, so shrinking a unit must not look private.
        share = share.float()
        share = share / (share.std((0, 2, 3), keepdim=True) + 1e-4)
        reach, step = 3 if width >= 4 else 1, math.ceil(max(height, width) / LEAKAGE_PLACES)
        x = F.unfold(share, reach, padding=reach // 2, stride=step).transpose(1, 2).flatten(0, 1)
        y = F.pixel_unshuffle(images, block)[..., ::step, ::step]
        y = y.flatten(2).transpose(1, 2).flatten(0, 1)
        x, y = x - x.mean(0), y - y.mean(0)
        xx, xy = x.T @ x / len(x), x.T @ y / len(x)
        ridge = RIDGE * xx.diagonal().mean() + 1e-8
        weights = torch.linalg.solve(xx + ridge * torch.eye(len(xx), device=xx.device), xy)
        explained: Tensor = (weights * xy).sum() / y.square().mean(0).sum()
        return explained
