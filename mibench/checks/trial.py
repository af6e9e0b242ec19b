"""One component on trial: its processes, the images it meets, and what they answered so far."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mibench.checks.confine import Limits
from mibench.checks.process import Nursery, Process
from mibench.checks.shares import unnamed
from mibench.data.procedural import CLASS_NAMES, INDEX_LIMIT, SEED_LIMIT, render
from mibench.defenses.base import Shares
from mibench.files import Json

SIZE = 32
"""Pixels a side."""
TRAIN, MANY, SOME = 256, 256, 32
"""Images to train on, to look at messages of, and to look at closely."""
DRAWS = 8
"""Transmissions of the same images, to know their noise by."""
NEUTRAL = "mibench check"
LEARNING = 120.0
"""Seconds that the short training may take, also on a busy machine."""


@dataclass(frozen=True)
class Setting:
    """A small classifier and a short training.

    Attributes:
        title: for messages.
        backbone: name of the family.
        backbone_params: its parameters.
        split_point: where it is cut.
        recipe: values of a `mibench.protocol.Recipe`.
    """

    title: str
    backbone: str
    backbone_params: Mapping[str, Json]
    split_point: str
    recipe: Mapping[str, Json] = field(
        default_factory=lambda: {
            "steps": 40,
            "batch": 32,
            "lr": 0.05,
            "crop": 2,
            "precision": "fp32",
            # So that only a gradient can move a weight.
            "weight_decay": 0.0,
            "clip": 5.0,
        }
    )


MAPS = Setting("maps", "small-resnet", {"stem": 16, "width": 16}, "stem")
TOKENS = Setting("tokens", "small-vit", {"width": 32, "depth": 4, "heads": 2}, "block1")
SETTINGS = (MAPS, TOKENS)


class Trial:
    """A defense in one setting. Everything is computed when it is first asked for, and kept.

    Client and every server are processes of their own, with the weights that a third process, the
    trainer, has trained. Shares cross as bytes, through this object.

    Args:
        nursery: starts the processes.
        name: of the defense, or ``/path/file.py:Class``.
        params: its parameters.
        setting: backbone and training.
        limits: of each process.
        readable: folders that the component may read.
        declared: what its registration says of its randomness; None where it says nothing.
    """

    def __init__(
        self,
        nursery: Nursery,
        name: str,
        params: Mapping[str, Json],
        setting: Setting,
        limits: Limits,
        readable: tuple[Path, ...] = (),
        declared: str | None = None,
    ) -> None:
        self.nursery = nursery
        self.name = name
        self.params = params
        self.setting = setting
        self.limits = limits
        self.readable = readable
        self.declared = declared
        self.processes: list[Process] = []
        # Nobody can know these images or these streams before.
        self.seed = secrets.randbelow(SEED_LIMIT)
        self._first = secrets.randbelow(INDEX_LIMIT - 2**16)

    def close(self) -> None:
        """Ends all processes."""
        for process in self.processes:
            process.close()

    # --- processes -------------------------------------------------------------------------------

    def start(self, role: str) -> Process:
        """Starts a process and builds the defense in it, with initial weights."""
        process = self.nursery.start(role, self.limits, self.readable)
        self.processes.append(process)
        loaded, _ = process.ask(
            "component.load", kind="defense", name=self.name, params=dict(self.params)
        )
        built, _ = process.ask(
            "defense.build",
            backbone=self.setting.backbone,
            backbone_params=dict(self.setting.backbone_params),
            split_point=self.setting.split_point,
            image_shape=[3, SIZE, SIZE],
            classes=list(CLASS_NAMES),
            seed=0,
        )
        self.facts = {**loaded, **built}
        return process

    def stand_in(self, role: str) -> Process:
        """Starts a process with the trained weights."""
        weights = self.weights
        process = self.start(role)
        process.ask("defense.load", weights)
        return process

    @cached_property
    def trainer(self) -> Process:
        """Where the defense is trained; it holds all of it."""
        process = self.start("trainer")
        # For what shall be looked at before the training.
        self.initial = process.ask("defense.state")[1] if self.misfit is None else {}
        return process

    @property
    def misfit(self) -> str | None:
        """Why the defense cannot be built on this backbone, if so."""
        found: str | None = self.facts["misfit"]
        return found

    @cached_property
    def trained(self) -> dict[str, Any]:
        """What the training said of itself."""
        said, _ = self.trainer.ask(
            "defense.fit", self.train, seconds=LEARNING, recipe=self.recipe, seed=self.seed
        )
        return said

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The trained weights."""
        assert self.trained
        return self.trainer.ask("defense.state")[1]

    @cached_property
    def client(self) -> Process:
        """The user's process."""
        return self.stand_in("client")

    @cached_property
    def reader(self) -> Process:
        """The user's process when replies come back; it has sent nothing and remembers nothing."""
        return self.stand_in("reader")

    @cached_property
    def servers(self) -> list[Process]:
        """A process for each server."""
        assert self.trained
        return [self.stand_in(f"server-{k}") for k in range(self.facts["servers"])]

    @cached_property
    def undefended_flops(self) -> tuple[int, int]:
        """FLOPs of client and server of the undefended split."""
        plain = Trial(self.nursery, "none", {}, self.setting, self.limits)
        try:
            told, _ = plain.start("undefended").ask("defense.cost", {"images": self.some[:1]})
        finally:
            plain.close()
        return int(told["client_flops"]), int(told["server_flops"])

    # --- images ----------------------------------------------------------------------------------

    @property
    def recipe(self) -> dict[str, Json]:
        """Of the training."""
        return dict(self.setting.recipe)

    @cached_property
    def train(self) -> dict[str, Tensor]:
        """Images to train on: uint8 ``pixels`` with ``labels``."""
        pixels, labels = self._rendered(0, TRAIN)
        return {"pixels": pixels, "labels": labels}

    @cached_property
    def many(self) -> Tensor:
        """`MANY` other images in [0, 1]."""
        return self._rendered(TRAIN, MANY)[0].float() / 255

    @property
    def some(self) -> Tensor:
        """The first `SOME` of `many`."""
        return self.many[:SOME]

    def _rendered(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        first = self._first + start
        return render(torch.arange(first, first + count), seed=self.seed, size=SIZE)

    # --- messages --------------------------------------------------------------------------------

    def send(
        self,
        images: Tensor,
        *ambient: str | int,
        process: Process | None = None,
        grad: bool = False,
    ) -> Shares:
        """Sends images through the client while a named random stream is active."""
        stream: list[Json] = [*(ambient or (self.seed, NEUTRAL))]
        ask = (process or self.client).ask
        _, found = ask("defense.protect", {"images": images}, ambient=stream, grad=grad)
        return unnamed(found)

    def predict(self, images: Tensor, *ambient: str | int) -> Shares:
        """Returns the message's parameters."""
        stream: list[Json] = [*(ambient or (self.seed, NEUTRAL))]
        return unnamed(self.client.ask("defense.predict", {"images": images}, ambient=stream)[1])

    def replies(self, shares: Shares) -> Shares:
        """Returns the reply of every server, each from its own process, to its own share."""
        return tuple(
            server.ask("defense.serve", {"share": share}, index=k)[1]["reply"]
            for k, (server, share) in enumerate(zip(self.servers, shares, strict=True))
        )

    def logits(self, shares: Shares) -> Tensor:
        """Returns what client and servers, all in their own processes, make of shares."""
        replies = {f"reply.{k}": reply for k, reply in enumerate(self.replies(shares))}
        return self.reader.ask("defense.fuse", replies)[1]["logits"]

    @cached_property
    def draws(self) -> Shares:
        """`DRAWS` transmissions of `some`, stacked in front: (R, B, ...) for each server."""
        sent = [self.send(self.some, self.seed, "draw", turn) for turn in range(DRAWS)]
        return tuple(torch.stack(parts).float() for parts in zip(*sent, strict=True))

    @cached_property
    def random(self) -> bool:
        """Whether two transmissions of the same images differ."""
        return any(bool((one != one[:1]).any()) for one in self.draws)

    @cached_property
    def messages(self) -> Tensor:
        """What is sent for `many` before any randomness, flat (N, values), all servers together."""
        found = self.predict(self.many) if self.random else self.send(self.many)
        return torch.cat([one.flatten(1).float() for one in found], 1)

    def noise_ratio(self, shares: Shares) -> float:
        """Returns the squared distance of a transmission of `some` from the mean of `draws`.

        In units of what it is for one of `draws` itself, so that 1 is the same law.
        """
        apart = usual = 0.0
        for draws, share in zip(self.draws, shares, strict=True):
            mean = draws.mean(0)
            usual += float((draws - mean).square().sum()) / (len(draws) - 1)
            apart += float((share.float() - mean).square().sum())
        return apart / max(usual * (1 + 1 / DRAWS), 1e-30)
