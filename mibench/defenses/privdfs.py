"""PrivDFS: distributed feature sharing over servers that never exchange activations."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import combinations
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.backbones.base import Split
from mibench.backbones.tokens import to_map, to_tokens
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Facts, Phase, Shares
from mibench.defenses.parts.closed_form import (
    explained_alone,
    explained_by_tokens,
    explained_variance,
)
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
SCORED_IMAGES = 2048
"""Training images on which the policy `information` scores the units."""
SCORED_SIDE = 8
"""Side in pixels, at most, to which images and units are averaged down for that score."""
LIVE = 0.05
"""Units whose deviation is less than so many times that of the median unit are dead."""
CHUNK = 128


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
    laid out on their grid, as the map (D, g, g), and cut like any map. With ``unit=token`` a unit
    is one place with all its channels: a share is n tokens, each with a code of its place added by
    the branch.

    From the abstract of v2: learnable binary masks, sparse and largely non-overlapping shares, a
    branch per server, a light fusion of the branches' predictions on the client. Inferred here,
    since the rest is not public: K, granularity and density; that a branch may reply an embedding
    beside its class scores (off by default); mask logits with a drop slot, trained
    with straight-through gradients and a greedy assignment that makes sizes equal and overlap zero;
    masks learned in the first half of the training and frozen after it; the loss

        L = CE(fused) + b mean_k CE(branch_k) + l max_k R2_k,

    where R2_k is the share of the image's variance that the best linear decoder of share k explains
    (a ridge regression in closed form on the batch, from 3x3 neighbourhoods of the share to the
    pixels below it, or from a token to the pixels below it). It pulls at the stem. Masks of phases
    hardly feel it, since a factor in front of a unit is nothing to a linear decoder: with it or
    without, those masks are learned from the task. For vision transformers, of which the abstract
    says no more than that the method applies to them, also: the units of a token grid; and that
    class tokens are not sent, so that each branch pools its own share. The leakage term of large
    images is that of a thinned-out one, see `explained_variance`.

    Two more policies stand beside the learned masks. ``random`` keeps the first ones, as a control.
    ``information``, which is ours, trains the undefended split in the first half, freezes it,
    scores each unit by the variance of the image that it explains alone, and deals the K n lowest
    live ones to the shares in turn; branches and fusion learn in the second half.
    """

    class Params(Defense.Params):
        """Number and size of the shares, and the weights of the loss."""

        servers: int = Field(default=4, ge=2, le=64, description="K, number of servers")
        density: float = Field(
            default=0.0625, gt=0, le=1, description="share of all features that one server receives"
        )
        unit: Literal["phase", "token"] = Field(
            default="phase",
            description="what masks keep: a channel at one phase of a grid, or a whole token",
        )
        period: int = Field(
            default=2, ge=1, description="p, grid period of a phase; 1 is a whole channel"
        )
        width: int = Field(
            default=48, ge=4, le=4096, description="channels of a branch's first stage"
        )
        embedding: int = Field(
            default=0,
            ge=0,
            le=4096,
            description="values that a branch replies beside its class scores",
        )
        branch: float = Field(default=0.3, ge=0, description="b, weight of the branches' own loss")
        leakage: float = Field(default=0.3, ge=0, description="l, weight of the leakage term")
        masks: Literal["learned", "random", "information"] = Field(
            default="learned",
            description="learned with the model, random as a control, or the least telling units",
        )

        @model_validator(mode="after")
        def _reachable(self) -> Self:
            if self.masks == "information" and self.leakage:
                raise ValueError(
                    "masks=information freezes the client before it sends shares, so the leakage "
                    f"term could change nothing: set leakage to 0 (it is {self.leakage:g})"
                )
            return self

    params: Params
    assignment: Tensor  # (K, n) unit indices

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        self.prefix = split.prefix_tokens
        self.image_values = math.prod(split.image_shape)
        example = to_map(torch.zeros(1, *split.feature_shape), self.prefix)
        channels, height, width = example.shape[1:]
        p, k = params.period, params.servers
        self.grid = (height, width)
        self.unit_shape: tuple[int, ...]
        if params.unit == "token":
            self.units, self.unit_shape = height * width, (channels,)
        elif height % p or width % p:
            raise InvalidParamsError(
                f"{self.name}.period is {p}, which does not divide the feature map of "
                f"{height}x{width}; choose a divisor."
            )
        else:
            self.units, self.unit_shape = channels * p * p, (height // p, width // p)
        self.kept = max(1, round(params.density * self.units))
        if k * self.kept > self.units:
            raise InvalidParamsError(
                f"{self.name}: {k} servers with density {params.density} need {k * self.kept} "
                f"units, but there are {self.units}; shares do not overlap, so density can be at "
                f"most {1 / k:.4g}."
            )
        if params.masks != "information":
            del self.server  # every server has a branch of its own instead
        self.logits = nn.Parameter(0.01 * torch.randn(k * self.units))
        outputs = split.classes + params.embedding
        if params.unit == "token":
            # A code for each place that a branch might receive.
            self.embed = nn.Parameter(0.02 * torch.randn(k, self.units, channels))
            share_shape = (self.kept, channels)
            self.branches = nn.ModuleList(
                split.branch(share_shape, outputs, params.width) for _ in range(k)
            )
        else:
            # First layer of every branch, with a column for each unit it might receive.
            self.embed = nn.Parameter(torch.randn(k, params.width, self.units) / self.kept**0.5)
            map_shape = (params.width, *self.unit_shape)
            self.branches = nn.ModuleList(
                nn.Sequential(
                    nn.BatchNorm2d(params.width), split.branch(map_shape, outputs, params.width)
                )
                for _ in range(k)
            )
        self.classes = split.classes
        replied = k * outputs
        self.fusion = nn.Sequential(
            nn.LayerNorm(replied),
            nn.Linear(replied, 64),
            nn.ReLU(),
            nn.Linear(64, split.classes),
        )
        self.register_buffer("assignment", torch.zeros(k, self.kept, dtype=torch.int64))
        self._assign()
        self.first_assignment = self.assignment.clone()
        self.client_is_frozen = False

    @property
    def servers(self) -> int:
        """K."""
        return self.params.servers

    @property
    def phases(self) -> tuple[Phase, ...]:
        """One, or the undefended split first and then, on its frozen stem, branches and fusion."""
        if self.params.masks == "information":
            return (Phase("stem", 0.5), Phase("branches", 0.5))
        return super().phases

    def begin(self, phase: str, train: ImageSet) -> None:
        """Freezes the trained stem and deals its least telling units."""
        if phase == "branches":
            self.client_is_frozen = True
            for finished in (self.client, self.server):
                finished.eval().requires_grad_(requires_grad=False)
            self._deal(train)

    def train(self, mode: bool = True) -> Self:
        """Sets the mode; a frozen client keeps its batch statistics."""
        super().train(mode)
        if self.client_is_frozen:
            self.client.eval()
        return self

    def protect(self, images: Tensor) -> Shares:
        """Returns K shares of kept entries only: (B, n, H/p, W/p), or n tokens (B, n, C)."""
        units = self._cut(images)
        return tuple(units[:, kept] for kept in self.assignment)

    def serve(self, index: int, share: Tensor) -> Tensor:
        """Branch ``index``: its share → class scores (B, classes), and embedding."""
        kept = self.assignment[index]
        if self.params.unit == "token":
            entered = share + self.embed[index][kept]
        else:
            entered = F.conv2d(share, self.embed[index][:, kept, None, None])
        reply: Tensor = self.branches[index](entered)
        return reply

    def fuse(self, replies: tuple[Tensor, ...]) -> Tensor:
        """Fusion network on the client over the K replies."""
        fused: Tensor = self.fusion(torch.cat(replies, dim=1))
        return fused

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:
        """CE of the fused prediction, of the branches, and the worst share's linear leakage."""
        if step.phase == "stem":
            return super().loss(images, labels, step)
        shares, replies = self._exchange(images, step)
        return self._terms(shares, replies, images, labels)

    def training_logits(self, images: Tensor, step: Step) -> Tensor:
        """Fused, or in the phase ``stem`` those of the undefended split."""
        if step.phase == "stem":
            logits: Tensor = self.server(self.client(images))
            return logits
        return self.fuse(self._exchange(images, step)[1])

    def _exchange(self, images: Tensor, step: Step) -> tuple[Shares, Shares]:
        """Shares and replies of a training step; while masks are learned, gradients reach them."""
        units = self._cut(images)
        if self.params.masks != "learned" or step.progress >= FREEZE:
            shares = tuple(units[:, kept] for kept in self.assignment)
            return shares, tuple(self.serve(k, share) for k, share in enumerate(shares))
        if step.index % REASSIGN_EVERY == 0:
            self._assign()
        masks = self._straight_through()
        shares = tuple(
            units[:, kept] * mask[kept].view(-1, *(1,) * len(self.unit_shape))
            for mask, kept in zip(masks, self.assignment, strict=True)
        )
        if self.params.unit == "token":
            return shares, tuple(self.serve(k, share) for k, share in enumerate(shares))
        # Masking the first layer's weights is masking its input, and much cheaper; dropped
        # units take part, so that gradients tell what they would be worth.
        weight = (self.embed * masks[:, None]).flatten(0, 1)
        embedded = F.conv2d(units, weight[..., None, None]).chunk(self.servers, dim=1)
        replies = (branch(part) for branch, part in zip(self.branches, embedded, strict=True))
        return shares, tuple(replies)

    def _terms(self, shares: Shares, replies: Shares, images: Tensor, labels: Tensor) -> Losses:
        terms = {"task": self.task.loss(self.fuse(replies), labels)}
        if self.params.branch:
            scores = [reply[:, : self.classes] for reply in replies]
            own = torch.stack([self.task.loss(score, labels) for score in scores])
            terms["branch"] = self.params.branch * own.mean()
        if self.params.leakage:
            some = slice(0, LEAKAGE_IMAGES)
            explained = [
                self._explained(k, share[some], images[some]) for k, share in enumerate(shares)
            ]
            terms["leakage"] = self.params.leakage * torch.stack(explained).max()
        return terms

    def describe(self) -> Facts:
        """Size of the shares, also against the image, their overlap, and what learning moved."""
        shares = [set(row.tolist()) for row in self.assignment]
        first = [set(row.tolist()) for row in self.first_assignment]
        sizes = [len(share) for share in shares]
        common = [len(a & b) / min(len(a), len(b)) for a, b in combinations(shares, 2)]
        values = self.kept * math.prod(self.unit_shape)
        return {
            "units": self.units,
            "units_per_share": self.kept,
            "values_per_share": values,
            "share_to_image": values / self.image_values,
            "density": self.kept / self.units,
            "overlap": max(common),
            "balance": min(sizes) / max(sizes),
            "units_moved": [len(now - one) for now, one in zip(shares, first, strict=True)],
        }

    @torch.no_grad()
    def examine(self, images: ImageSet) -> Facts:
        """Accuracy fused, of each branch alone, and fused while each branch's reply is zeros.

        What a branch tells alone is learned by its own loss: without it (b = 0) it says nothing.
        """
        device = self.assignment.device
        found = []
        labels = torch.split(images.labels, CHUNK)
        for some, wanted in zip(images.chunks(CHUNK), labels, strict=True):
            shares = self.protect(some.to(device))
            replies = tuple(self.serve(k, share) for k, share in enumerate(shares))
            alone = [reply[:, : self.classes] for reply in replies]
            without = [
                self.fuse((*replies[:k], torch.zeros_like(replies[k]), *replies[k + 1 :]))
                for k in range(self.servers)
            ]
            told = [self.fuse(replies), *alone, *without]
            found.append(torch.stack([self.task.correct(t, wanted.to(device)) for t in told]))
        means = torch.cat(found, dim=1).mean(1).tolist()
        fused, *rest = (round(mean, 4) for mean in means)
        return {
            "fused_accuracy": fused,
            "branch_accuracy": rest[: self.servers],
            "accuracy_without": rest[self.servers :],
        }

    def client_modules(self) -> Iterable[nn.Module]:
        """Stem and fusion run on the client."""
        return [self.client, self.fusion]

    def _cut(self, images: Tensor) -> Tensor:
        """All units (B, M, H/p, W/p), or (B, M, C) where they are tokens."""
        features = to_map(self.client(images), self.prefix)
        if self.params.unit == "token":
            return to_tokens(features)
        return F.pixel_unshuffle(features, self.params.period)

    def _explained(self, index: int, share: Tensor, images: Tensor) -> Tensor:
        if self.params.unit == "token":
            return explained_by_tokens(share, images, self.assignment[index], self.grid)
        return explained_variance(share, images)

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

    @torch.no_grad()
    def _deal(self, train: ImageSet) -> None:
        """Deals the K n live units that tell least of the image, by rank, to the shares in turn."""
        device = self.assignment.device
        batches = (some.to(device) for some in train.take(SCORED_IMAGES).chunks(CHUNK))
        explained, deviation = explained_alone(
            (_averaged(self._cut(images)), _averaged(images).flatten(1)) for images in batches
        )
        dead = deviation <= LIVE * deviation.median()
        # No unit explains more than everything, so the dead ones come last.
        order = (explained + 2 * dead).argsort(stable=True)[: self.servers * self.kept]
        self.assignment.copy_(order.view(self.kept, self.servers).T.sort(1).values)


def _averaged(maps: Tensor) -> Tensor:
    """Maps (B, n, h, w) as vectors (B, n, d) of `SCORED_SIDE` places a side; tokens stay."""
    if maps.ndim == 3:
        return maps
    height, width = (min(side, SCORED_SIDE) for side in maps.shape[2:])
    return F.adaptive_avg_pool2d(maps, (height, width)).flatten(2)
