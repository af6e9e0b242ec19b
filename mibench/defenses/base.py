"""What a defense is: the client's protection, one server function per share, and the fusion."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.backbones.base import Split
from mibench.data.sets import ImageSet
from mibench.errors import InvalidParamsError, PluginError
from mibench.files import Json
from mibench.params import Parameters
from mibench.protocol import Recipe
from mibench.training import History, Losses, Step, augment, optimise, shuffled_batch

Shares = tuple[Tensor, ...]
"""What the client sends: one tensor per server, batch axis first."""

TOLERANCE = 0.05
"""Deviation, in units of a share's RMS, that an attacker allows a deterministic message."""


class Phase(NamedTuple):
    """A part of the training with a learning-rate schedule of its own.

    Attributes:
        name: what `Defense.begin` and the step are told.
        share: share of the recipe's steps.
    """

    name: str
    share: float = 1.0


class Defense(nn.Module, ABC):
    """A classifier split over a client and one or more servers, with a protection between them.

    A subclass overrides `protect`, and where it has more than one server or a client-side fusion,
    `servers`, `serve` and `fuse`. A randomised defense also overrides `predict` and
    `log_likelihood`, so that every attack meets its true law.

    Args:
        split: the classifier, cut at the protocol's split point, before training. Its features
            are maps (C, h, w) or tokens (N, D), and a defense handles both.
        params: the defense's own parameters.
    """

    required: ClassVar[tuple[str, ...]] = ("protect",)
    name: ClassVar[str]
    version: ClassVar[int]

    class Params(Parameters):
        """Parameters of the defense; each field becomes a ``--set defense.<field>`` option."""

    def __init_subclass__(cls, **keywords: object) -> None:
        super().__init_subclass__(**keywords)
        for name in ("forward", "__call__", "transmit"):
            if name in cls.__dict__:
                raise PluginError(
                    f"{cls.__name__} overrides {name}(); a defense overrides protect(), serve() "
                    "and fuse(), so that nothing but its shares reaches a server"
                )

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__()
        self.params = params
        self.task = split.task
        self.client = split.client
        self.server = split.server

    @property
    def servers(self) -> int:
        """Number of servers that each receive one share."""
        return 1

    @abstractmethod
    def protect(self, images: Tensor) -> Shares:
        """Client: images (B, 3, H, W) in [0, 1] → one share per server, randomness included."""

    def serve(self, index: int, share: Tensor) -> Tensor:  # noqa: ARG002
        """Server ``index``: its own share → its reply (B, ...); it never sees another share."""
        reply: Tensor = self.server(share)
        return reply

    def fuse(self, replies: tuple[Tensor, ...]) -> Tensor:
        """Client: the servers' replies → logits (B, classes)."""
        return replies[0]

    def forward(self, images: Tensor) -> Tensor:
        """Images → logits (B, classes), along the only path there is; never overridden."""
        return self.answer(self.protect(images))

    def answer(self, shares: Shares) -> Tensor:
        """Servers and fusion: shares → logits (B, classes)."""
        return self.fuse(tuple(self.serve(k, share) for k, share in enumerate(shares)))

    def predict(self, images: Tensor) -> Shares:
        """The message's parameters before any randomness; differentiable in the images.

        A deterministic defense sends exactly this. For a random one it is one tensor per server
        with whatever `log_likelihood` needs, such as mean and deviation.
        """
        return self.protect(images)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """Log-density (B,) of received shares given `predict`'s output, up to a constant.

        Both tuples hold the corrupted servers' shares only. For a deterministic client this is a
        Gaussian whose deviation is `TOLERANCE` times the share's RMS, per image.
        """
        total = shares[0].new_zeros(len(shares[0]))
        for share, guess in zip(shares, predicted, strict=True):
            scale = TOLERANCE * share.flatten(1).square().mean(1).sqrt().clamp_min(1e-6)
            total = total - (share - guess).flatten(1).square().sum(1) / (2 * scale.square())
        return total

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:
        """Named loss terms (scalars) of one training step; the trainer minimises their sum.

        Args:
            images: (B, 3, H, W) in [0, 1], augmented.
            labels: (B,) class indices, or (B, A) attributes; `self.task` knows what to do.
            step: where training stands.
        """
        return {"task": self.task.loss(self.training_logits(images, step), labels)}

    def training_logits(self, images: Tensor, step: Step) -> Tensor:  # noqa: ARG002
        """Images → logits, along the path that this step trains; by default the one of use."""
        logits: Tensor = self(images)
        return logits

    @property
    def phases(self) -> tuple[Phase, ...]:
        """Parts of the training, in order; their shares add up to 1."""
        return (Phase("training"),)

    def begin(self, phase: str, train: ImageSet) -> None:
        """Called before each phase: the place to measure scales and to freeze what is finished.

        A parameter that does not require a gradient when this returns does not learn in the phase.
        """

    def observe(self, train: ImageSet, step: Step) -> None:
        """Called before every step, for a loss that needs more than one batch of images."""

    def finish(self, train: ImageSet) -> None:
        """Called after the last phase, in evaluation mode, to measure what the law needs."""

    def fit(self, train: ImageSet, recipe: Recipe, seed: int, checkpoint: Checkpoint) -> Facts:
        """Trains client, servers and fusion, phase by phase; returns facts for the record."""
        self.to(memory_format=torch.channels_last)
        parts = divided(self.phases, recipe.steps, self.name)
        several = len(parts) > 1
        losses: Facts = {}
        for number, (phase, steps) in enumerate(parts):
            own = recipe.model_copy(update={"steps": steps})
            draws = seeding.derive(seed, phase.name) if number else seed
            with seeding.stream(draws, "begin"):
                self.begin(phase.name, train)
            kept = checkpoint.part(phase.name) if several else checkpoint
            course = self._learn(phase, train, own, draws, kept)
            losses |= {f"{phase.name}/{k}" if several else k: v for k, v in course.items()}
        with seeding.stream(seed, "finish"):
            self.finish(train)
        # The layout in memory decides where random draws land: leave it as it is after loading.
        self.to(memory_format=torch.contiguous_format)
        return {"steps": recipe.steps, "losses": losses, **self.describe()}

    def _learn(
        self, phase: Phase, train: ImageSet, recipe: Recipe, seed: int, checkpoint: Checkpoint
    ) -> History:
        device = next(self.parameters()).device

        def losses(step: Step) -> Losses:
            now = replace(step, phase=phase.name)
            self.observe(train, now)
            index = shuffled_batch(len(train), recipe.batch, seed, step.index)
            images = train.images(index).to(device)
            images = augment(images, recipe, step.generator)
            images = images.contiguous(memory_format=torch.channels_last)
            return self.loss(images, train.labels[index].to(device), now)

        title = f"Training {self.name}"
        if len(self.phases) > 1:
            title += f", {phase.name}"
        return optimise(self, losses, recipe, seed=seed, checkpoint=checkpoint, title=title)

    def describe(self) -> Facts:
        """Facts about the trained defense for the record, such as what its masks became."""
        return {}

    def examine(self, images: ImageSet) -> Facts:  # noqa: ARG002
        """Facts that take images, such as what one server's branch answers alone.

        Args:
            images: validation images with the labels of the task; never private ones.
        """
        return {}

    def client_modules(self) -> Iterable[nn.Module]:
        """Modules that run on the client, for the cost of its parameters."""
        return [self.client]

    @torch.no_grad()
    def transmit(self, images: ImageSet, batch: int, seed: int) -> Shares:
        """Sends a whole set through the client: one transmission per image, on the CPU."""
        device = next(self.parameters()).device
        sent: list[Shares] = []
        with seeding.stream(seed, "transmission"):
            for start in range(0, len(images), batch):
                chunk = images.images(slice(start, start + batch)).to(device)
                sent.append(tuple(share.cpu() for share in self.protect(chunk)))
        return tuple(torch.cat(parts) for parts in zip(*sent, strict=True))


def divided(phases: tuple[Phase, ...], steps: int, name: str) -> list[tuple[Phase, int]]:
    """Returns each phase with its number of steps, ``steps`` in all.

    Raises:
        PluginError: names are not plain and distinct, or shares do not add up to 1.
        InvalidParamsError: there are fewer steps than phases.
    """
    names, shares = [phase.name for phase in phases], [phase.share for phase in phases]
    plain = all(re.fullmatch("[a-z0-9_-]+", one) for one in names)
    if not plain or len(set(names)) < len(names) or not math.isclose(sum(shares), 1):
        raise PluginError(
            f"defense {name}: phases must have distinct names of a-z, 0-9, - and _ and shares that "
            f"add up to 1, not {[tuple(phase) for phase in phases]}"
        )
    ends = [round(steps * sum(shares[: number + 1])) for number in range(len(shares))]
    found = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    if min(found) < 1:
        raise InvalidParamsError(
            f"defense {name} trains in {len(phases)} phases, and {steps} steps leave one of them "
            "none; raise recipe.steps"
        )
    return list(zip(phases, found, strict=True))


Facts = dict[str, Json]
