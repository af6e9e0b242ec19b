"""Query-free inversion: a shadow of the client, learned through the curious servers alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.budget import images_at_once
from mibench.attacks.decoder import Decoder
from mibench.attacks.gradient import Gradient
from mibench.attacks.inverse import grid_side
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Shares
from mibench.deployment import hash_tensors
from mibench.errors import NotApplicableError
from mibench.files import Json
from mibench.protocol import Recipe
from mibench.registry import attacks
from mibench.threat import Adversary, Knowledge, Target, mean_transmission
from mibench.training import Losses, Step, augment, optimise, shuffled_batch

VECTOR_SIDE = 4
"""Side of the map from which the shadow computes a share that is no map and no tokens; its trunk
ends no coarser."""

SECOND: dict[str, type[Attack]] = {"decoder": Decoder, "gradient": Gradient}
"""Attacks that can be run on the shadow, by the name of the parameter that holds theirs."""

STATISTICS = 1024
"""Auxiliary images on which the shadow's shares are measured."""
LEAST_MATCHED = 16
"""Received messages from which mean and deviation are taken; those of fewer are too uncertain."""


@attacks.register("query-free", knowledge="data_only", paper="He et al., ACSAC 2019")
class QueryFree(Attack):
    """min_s CE(servers(s(x)), y), then an attack on the shadow client s instead of the client.

    The curious servers hold their own networks and auxiliary images x with labels y of the task.
    They train a shadow s in front of these networks, which stay frozen, until the replies tell the
    labels, and take it for the client: ``decoder`` or ``gradient`` runs against it, unchanged, with
    full knowledge of it. With several corrupted servers the losses of their replies are averaged;
    the shadow's shares have a common trunk, as the client's have.

    He et al. give the shadow the client's architecture or another one; here it is always another
    one (see `Shadow`), since the attacker does not know the client's. It cannot be expected to
    compute the client's features: the task only asks for features that the servers read alike.

    So the scale of its shares is not that of the client's. The adversary sees the latter: mean and
    deviation of each channel, over all the received messages that it is handed at once, are brought
    to those of the shadow on the auxiliary images, where that are `LEAST_MATCHED` images or more.
    Nothing else passes from one image to another. (FORA, arXiv 2405.04115, aligns the whole
    distribution by MK-MMD, while its shadow learns.) The law of a randomised client is unknown too,
    so repeated transmissions are averaged and the rest is taken for the message of a deterministic
    one.
    """

    knowledge = Knowledge.DATA_ONLY
    labels = True

    class Params(Attack.Params):
        """The shadow and its training, and the attack on it."""

        then: Literal["decoder", "gradient"] = Field(
            default="decoder", description="attack that is run on the shadow"
        )
        steps: int = Field(default=1000, gt=0, description="training steps of the shadow")
        batch: int = Field(default=64, gt=0, description="images per step")
        lr: float = Field(default=2e-3, gt=0, description="peak learning rate of AdamW")
        width: int = Field(default=64, gt=0, le=4096, description="channels of the shadow")
        decoder: Decoder.Params = Field(
            default=Decoder.Params(), description="parameters of the decoder, where that follows"
        )
        gradient: Gradient.Params = Field(
            default=Gradient.Params(), description="parameters of the descent, where that follows"
        )

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._attack = SECOND[params.then](getattr(params, params.then), workshop)
        self._shadow: Shadow | None = None
        self._facts: dict[str, Json] = {}

    @classmethod
    def budget(cls, params: Any) -> tuple[str, ...]:
        """The shadow's steps, and those of the attack on it."""
        second = SECOND[params.then].budget(getattr(params, params.then))
        return "steps", *(f"{params.then}.{key}" for key in second)

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:
        """Trains the shadow, or takes it from the cache, and prepares the attack on it.

        Raises:
            NotApplicableError: a corrupted server does not reply class scores.
        """
        shop, params = self.workshop, self.params
        servers = len(target.adversary.corrupted)
        example = torch.zeros(2, *shop.image_shape, device=shop.device)
        shapes = target.share_shapes(example)[:servers]
        with seeding.stream(shop.seed, "shadow"):
            shadow = Shadow(shop.image_shape, shapes, params.width).to(shop.device)
        _check(target, shadow.protect(example))
        recipe = Recipe(
            steps=params.steps, batch=params.batch, optimizer="adamw", lr=params.lr,
            weight_decay=1e-4, warmup=0.05, crop=0,
        )  # fmt: skip
        seed = seeding.derive(shop.seed, "shadow training")

        def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            def losses(step: Step) -> Losses:
                index = shuffled_batch(len(auxiliary), params.batch, seed, step.index)
                images = augment(auxiliary.images(index).to(shop.device), recipe, step.generator)
                labels = auxiliary.labels[index].to(shop.device)
                replies = target.replies(shadow.protect(images))
                told = [target.task.loss(reply.float(), labels) for reply in replies]
                return {"task": torch.stack(told).mean()}

            course = optimise(
                shadow, losses, recipe, seed=seed, checkpoint=checkpoint, title="Training shadow"
            )
            shadow.measure(shadow.protect(some) for some, _ in self._some(auxiliary))
            facts: dict[str, Json] = {
                "losses": dict(course),
                "validation_accuracy": self._accuracy(target, shadow, validation),
            }
            return shadow.state_dict(), facts

        spec = {
            **self.spec_of(target, auxiliary, validation),
            # What follows the shadow does not change it.
            "params": params.model_dump(mode="json", include={"steps", "batch", "lr", "width"}),
        }
        artifact = shop.keep("shadow", spec, make)
        shadow.load_state_dict(artifact.tensors)
        self._shadow = shadow.eval().requires_grad_(requires_grad=False)
        own = Target(
            shadow,
            Adversary(Knowledge.WHITE_BOX, tuple(range(servers))),
            f"shadow-{artifact.key}-{hash_tensors(artifact.tensors)}",
        )
        self._attack.prepare(own, auxiliary, validation)
        self._facts = {
            "shadow_accuracy": artifact.facts["validation_accuracy"],
            "on_the_shadow": self._attack.facts(),
        }

    def reconstruct(self, shares: Shares) -> Tensor:
        """Runs the attack as if the shadow had sent the mean of the transmissions."""
        assert self._shadow is not None, "prepare() comes first"
        mean = mean_transmission(shares, self._shadow.servers)
        return self._attack.reconstruct(self._shadow.matched(mean))

    def facts(self) -> dict[str, Json]:
        """Accuracy of shadow and servers on the validation images, and the second attack's facts.

        What that attack reports of its error is measured on the shadow's shares, not the client's.
        """
        return self._facts

    def _some(self, images: ImageSet) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the first images and their labels, no more at once than memory surely holds."""
        size, some = images_at_once(self.workshop.image_shape), images.take(STATISTICS)
        for chunk, labels in zip(some.chunks(size), torch.split(some.labels, size), strict=True):
            yield chunk.to(self.workshop.device), labels.to(self.workshop.device)

    @torch.no_grad()
    def _accuracy(self, target: Target, shadow: Shadow, images: ImageSet) -> list[Json]:
        """How much each corrupted server tells rightly behind the shadow, in [0, 1]."""
        found = []
        with seeding.stream(self.workshop.seed, "shadow validation"):
            for some, labels in self._some(images):
                replies = target.replies(shadow.protect(some))
                told = [target.task.correct(reply.float(), labels) for reply in replies]
                found.append(torch.stack(told))
        return [round(mean, 4) for mean in torch.cat(found, dim=1).mean(1).tolist()]


class Shadow(Defense):
    """A small convolutional client of the attacker's own: a trunk, and a head for every share.

    The trunk halves the resolution by convolutions of stride 2, as often as the finest share
    allows. A deterministic client to those who attack it, see `Defense.log_likelihood`.

    Args:
        image_shape: (3, H, W).
        share_shapes: shape of each share without the batch axis: maps (C, h, w), tokens (N, D), or
            anything else, which is one vector.
        width: channels of the trunk.
    """

    name, version = "shadow", 1

    def __init__(
        self, image_shape: tuple[int, int, int], share_shapes: list[tuple[int, ...]], width: int
    ) -> None:
        nn.Module.__init__(self)  # it is cut from no classifier
        side = min(image_shape[1:])
        finest = max(VECTOR_SIDE, *(_places(shape)[0] for shape in share_shapes))
        halvings = max(0, round(math.log2(side / finest)))
        strides = [2] * halvings or [1]
        layers: list[nn.Module] = []
        for at, stride in enumerate(strides):
            layers += [
                nn.Conv2d(width if at else image_shape[0], width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(Head(shape, width) for shape in share_shapes)

    @property
    def servers(self) -> int:
        """As many as the adversary has corrupted."""
        return len(self.heads)

    def protect(self, images: Tensor) -> Shares:
        """Images (B, 3, H, W) in [0, 1] → one share for each corrupted server."""
        features = self.trunk(4 * images - 2)
        return tuple(head(features) for head in self.heads)

    @torch.no_grad()
    def measure(self, batches: Iterable[Shares]) -> None:
        """Notes mean and deviation of each channel of each share, from batches of its own."""
        found: list[list[Moments]] = [[] for _ in self.heads]
        for shares in batches:
            for moments, share in zip(found, shares, strict=True):
                moments.append(_moments(share))
        for head, moments in zip(self.heads, found, strict=True):
            assert isinstance(head, Head)
            total = sum(count for count, _, _ in moments)
            mean = torch.stack([count / total * one for count, one, _ in moments]).sum(0)
            parts = [count / total * (var + (one - mean).square()) for count, one, var in moments]
            head.mean.copy_(mean)
            head.std.copy_(torch.stack(parts).sum(0).sqrt())

    @torch.no_grad()
    def matched(self, shares: Shares) -> Shares:
        """Returns shares of a batch with mean and deviation of each channel as measured here."""
        if len(shares[0]) < LEAST_MATCHED:
            return shares
        out = []
        for head, share in zip(self.heads, shares, strict=True):
            assert isinstance(head, Head)
            _, mean, variance = _moments(share)
            std = variance.sqrt().to(share)
            # A channel without deviation tells nothing and becomes the shadow's mean.
            gain = torch.where(std > 1e-6, head.std / std, 0)
            out.append((share - mean.to(share)) * gain + head.mean)
        return tuple(out)


Moments = tuple[int, Tensor, Tensor]
"""Images, and mean and variance of each channel, float64 on the CPU, shaped like the share."""


class Head(nn.Module):
    """Features (B, width, h, w) → one share, by a convolution on the share's own grid.

    Tokens are the places of their grid, mixed by a learned matrix, since some may stand for no
    place; a code is added to each, as the client's may have one. A vector is one linear layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.grid = _places(shape)
        channels = {3: (1, shape[0], 1, 1), 2: (1, 1, shape[-1])}.get(len(shape), (1, *shape))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        places = math.prod(self.grid)
        self.mixing: nn.Module = nn.Identity()
        self.code: nn.Parameter | None = None
        if len(shape) == 3:
            self.layer: nn.Module = nn.Conv2d(width, shape[0], 3, padding=1)
        elif len(shape) == 2:
            self.layer = nn.Sequential(nn.Conv2d(width, shape[1], 3, padding=1), nn.Flatten(2))
            self.mixing = nn.Linear(places, shape[0], bias=False)
            # Class tokens stand in front and see every place; each other token sees its own.
            extra = max(0, shape[0] - places)
            nn.init.eye_(self.mixing.weight)
            with torch.no_grad():
                self.mixing.weight.copy_(self.mixing.weight.roll(extra, 0))
                self.mixing.weight[:extra] = 1 / places
            self.code = nn.Parameter(0.02 * torch.randn(shape))
        else:
            self.layer = nn.Sequential(
                nn.Flatten(), nn.Linear(width * places, math.prod(shape)), nn.Unflatten(1, shape)
            )

    def forward(self, features: Tensor) -> Tensor:
        """Returns the share (B, ...)."""
        out: Tensor = self.mixing(self.layer(F.adaptive_avg_pool2d(features, self.grid)))
        return out if self.code is None else out.transpose(1, 2) + self.code


def _places(shape: tuple[int, ...]) -> tuple[int, int]:
    """Returns the grid (h, w) from which a share of this shape is computed."""
    if len(shape) == 3:
        return shape[1], shape[2]
    if len(shape) == 2:
        return (grid_side(shape[0]),) * 2
    return VECTOR_SIDE, VECTOR_SIDE


def _moments(share: Tensor) -> Moments:
    """Mean and variance over all images and places: of maps' first axis, of tokens' last."""
    axes = {4: (0, 2, 3), 3: (0, 1)}.get(share.ndim, (0,))
    variance, mean = torch.var_mean(share, axes, correction=0, keepdim=True)
    return len(share), mean.cpu().double(), variance.cpu().double()


@torch.no_grad()
def _check(target: Target, shares: Shares) -> None:
    """Refuses servers whose replies tell nothing of the task."""
    outputs = target.task.outputs
    for server, reply in zip(target.adversary.corrupted, target.replies(shares), strict=True):
        if reply.shape[1:] != (outputs,):
            raise NotApplicableError(
                f"attack query-free learns from class scores, but server {server} replies values "
                f"of shape {tuple(reply.shape[1:])}, not the task's {outputs} scores; take "
                "`decoder` (needs black_box knowledge) or `gradient` (needs white_box) under a "
                "protocol that grants it"
            )
