"""Decoder inversion: a network that maps shares to images, trained on auxiliary images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.budget import images_at_once
from mibench.attacks.inverse import SIZES, InverseNetwork
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.errors import UnavailableError
from mibench.files import Json
from mibench.metrics.perceptual import LearnedPerceptualDistance
from mibench.protocol import Recipe
from mibench.registry import attacks, fingerprint
from mibench.threat import Knowledge, Target
from mibench.training import JUDGED, Judging, Losses, Step, augment, optimise, shuffled_batch

STATISTICS = 1024
"""Auxiliary images that set the standardisation of the decoder's input, and validation images."""
AVERAGE = 0.998
"""Decay of the weights' moving average."""


@attacks.register("decoder", knowledge="black_box", paper="He et al., ACSAC 2019")
class Decoder(Attack):
    """min_g E |g(z) - x|^2 / dim(x) + w LPIPS(g(z), x) over auxiliary images x and their shares z.

    He et al. train a mirror image of the client, w = 0. Departures, so that no defense meets a
    weaker decoder because its shares are smaller: one residual network of a fixed size for every
    defense, of which only the entries follow the shapes of the shares (see `InverseNetwork`);
    sigmoid output; a moving average of the weights, judged by the same objective on validation
    images ``judgements`` times, of which the best is kept. A randomised client is queried anew at
    every step, so the decoder learns the mean over its randomness.

    Two sizes: ``small``, three residual blocks of 64 channels, for a CPU, and ``large``, six blocks
    of 128 channels around a coarse level of 256 channels with self-attention. With w above 0 the
    images look sharper and their squared error is larger.
    """

    knowledge = Knowledge.BLACK_BOX

    class Params(Attack.Params):
        """Size, objective and training of the network."""

        size: Literal["small", "large"] = Field(
            default="small", description="0.23 M or 6.4 M parameters and more, entries apart"
        )
        perceptual: float = Field(
            default=0.0, ge=0, description="weight of LPIPS beside the mean squared error"
        )
        steps: int = Field(default=1000, gt=0, description="training steps")
        batch: int = Field(default=64, gt=0, description="images per step")
        lr: float = Field(default=2e-3, gt=0, description="peak learning rate of AdamW")
        judgements: int = Field(
            default=10, gt=0, description="times that the weights are judged on validation images"
        )
        patience: int | None = Field(
            default=None,
            gt=0,
            description="judgements in a row without a better one that end the training; null: "
            "all steps are done",
        )

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._network: InverseNetwork | None = None
        self._facts: dict[str, Json] = {}

    @classmethod
    def budget(cls, params: Any) -> tuple[str, ...]:  # noqa: ARG003
        """The training's steps."""
        return ("steps",)

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:
        """Trains the network on fresh queries, or takes it from the cache."""
        shop, params = self.workshop, self.params
        example = target.query(auxiliary.take(2).images().to(shop.device))
        with seeding.stream(shop.seed, "decoder"):
            network = InverseNetwork(
                [tuple(share.shape[1:]) for share in example],
                shop.image_shape,
                SIZES[params.size],
            ).to(shop.device)
        recipe = Recipe(
            steps=params.steps, batch=params.batch, optimizer="adamw", lr=params.lr,
            weight_decay=1e-4, warmup=0.05, crop=0, average=AVERAGE,
        )  # fmt: skip

        seed = seeding.derive(shop.seed, "decoder training")

        def error(judged: torch.nn.Module) -> float:
            return sum(self._errors(judged, target, validation).values())

        def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            self._require_perceptual()
            with seeding.stream(shop.seed, "decoder statistics"):
                network.standardise(target.query(some) for some in self._some(auxiliary))

            def losses(step: Step) -> Losses:
                index = shuffled_batch(len(auxiliary), params.batch, seed, step.index)
                images = auxiliary.images(index).to(shop.device)
                images = augment(images, recipe, step.generator)
                return self._terms(network(target.query(images)), images)

            every = math.ceil(params.steps / params.judgements)
            course = optimise(
                network, losses, recipe, seed=seed, checkpoint=checkpoint,
                title="Training decoder", judging=Judging(error, every, params.patience),
            )  # fmt: skip
            judged = course.pop(JUDGED)
            facts: dict[str, Json] = {
                "losses": dict(course),
                "validation_mse": self._errors(network, target, validation)["mse"],
                "chosen_step": min(judged, key=lambda one: one[1])[0],
                "validation_course": list(judged),
            }
            return network.state_dict(), facts

        spec = self.spec_of(target, auxiliary, validation)
        artifact = shop.keep("decoder", spec, make)
        network.load_state_dict(artifact.tensors)
        self._network = network.eval()
        self._facts = {name: fact for name, fact in artifact.facts.items() if name != "losses"}

    @torch.no_grad()
    def reconstruct(self, shares: Shares) -> Tensor:
        """One forward pass."""
        assert self._network is not None, "prepare() comes first"
        images: Tensor = self._network(shares)
        return images

    def facts(self) -> dict[str, Json]:
        """Validation error, the step whose weights were kept, and how all judged ones did."""
        return self._facts

    def _some(self, images: ImageSet) -> Iterator[Tensor]:
        """Yields the first images, no more at once than memory surely holds."""
        size = images_at_once(self.workshop.image_shape)
        for chunk in images.take(STATISTICS).chunks(size):
            yield chunk.to(self.workshop.device)

    def _terms(self, guess: Tensor, images: Tensor) -> dict[str, Tensor]:
        """The terms of the objective for a batch, scalars."""
        terms = {"mse": F.mse_loss(guess.float(), images)}
        if self.params.perceptual:
            # Full precision: it compares features whose differences are small.
            with torch.autocast(images.device.type, enabled=False):
                distance = LearnedPerceptualDistance().per_image(guess.float(), images).mean()
            terms["perceptual"] = self.params.perceptual * distance
        return terms

    def spec(self) -> dict[str, Json]:
        """Also the perceptual distance's code, where that is part of the loss."""
        lpips = fingerprint(LearnedPerceptualDistance) if self.params.perceptual else None
        return {**super().spec(), "lpips": lpips}

    def _require_perceptual(self) -> None:
        """Loads LPIPS before anything is trained, where the objective has it.

        Raises:
            UnavailableError: its weights cannot be had.
        """
        some = torch.zeros(1, *self.workshop.image_shape)
        try:
            self._terms(some, some)
        except UnavailableError as error:
            raise UnavailableError(
                f"attack decoder with perceptual={self.params.perceptual:g}: {error} (perceptual=0)"
            ) from error

    @torch.no_grad()
    def _errors(
        self, network: torch.nn.Module, target: Target, images: ImageSet
    ) -> dict[str, float]:
        """The terms of the objective on the first of these images, always with the same draws."""
        total: dict[str, float] = {}
        count = 0
        with seeding.stream(self.workshop.seed, "decoder validation"):
            for some in self._some(images):
                for name, term in self._terms(network(target.query(some)), some).items():
                    total[name] = total.get(name, 0.0) + len(some) * term.item()
                count += len(some)
        return {name: value / count for name, value in total.items()}
