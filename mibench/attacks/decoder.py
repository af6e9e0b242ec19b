"""Decoder inversion: a network that maps shares to images, trained on auxiliary images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.budget import images_at_once
from mibench.attacks.inverse import InverseNetwork
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.protocol import Recipe
from mibench.registry import attacks
from mibench.threat import Knowledge, Target
from mibench.training import Losses, Step, augment, optimise, shuffled_batch

STATISTICS = 1024
"""Auxiliary images that set the standardisation of the decoder's input, and validation images."""
AVERAGE = 0.998
"""Decay of the weights' moving average."""


@attacks.register("decoder", knowledge="black_box", paper="He et al., ACSAC 2019")
class Decoder(Attack):
    """min_g E |g(z) - x|^2 over auxiliary images x and the deployed client's shares z of them.

    He et al. train a mirror image of the client. Departures, so that no defense meets a weaker
    decoder because its shares are smaller: one residual network of fixed width for every defense,
    of which only the entries follow the shapes of the shares (see `InverseNetwork`); sigmoid
    output; a moving average of the weights. A randomised client is queried anew at every step, so
    the decoder learns the mean over its randomness.
    """

    knowledge = Knowledge.BLACK_BOX
    budget = ("steps",)

    class Params(Attack.Params):
        """Size and training of the network."""

        steps: int = Field(default=1000, gt=0, description="training steps")
        batch: int = Field(default=64, gt=0, description="images per step")
        lr: float = Field(default=2e-3, gt=0, description="peak learning rate of AdamW")
        width: int = Field(default=64, gt=0, description="channels of the residual blocks")
        blocks: int = Field(default=3, gt=0, description="residual blocks")

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._network: InverseNetwork | None = None
        self._facts: dict[str, Json] = {}

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:
        """Trains the network on fresh queries, or takes it from the cache."""
        shop, params = self.workshop, self.params
        example = target.query(auxiliary.take(2).images().to(shop.device))
        with seeding.stream(shop.seed, "decoder"):
            network = InverseNetwork(
                [tuple(share.shape[1:]) for share in example],
                shop.image_shape,
                params.width,
                params.blocks,
            ).to(shop.device)
        recipe = Recipe(
            steps=params.steps, batch=params.batch, optimizer="adamw", lr=params.lr,
            weight_decay=1e-4, warmup=0.05, crop=0, average=AVERAGE,
        )  # fmt: skip

        seed = seeding.derive(shop.seed, "decoder training")

        def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            with seeding.stream(shop.seed, "decoder statistics"):
                network.standardise(target.query(some) for some in self._some(auxiliary))

            def losses(step: Step) -> Losses:
                index = shuffled_batch(len(auxiliary), params.batch, seed, step.index)
                images = auxiliary.images(index).to(shop.device)
                images = augment(images, recipe, step.generator)
                return {"mse": F.mse_loss(network(target.query(images)).float(), images)}

            course = optimise(
                network, losses, recipe, seed=seed, checkpoint=checkpoint,
                title="Training decoder",
            )  # fmt: skip
            with seeding.stream(shop.seed, "decoder validation"):
                error = self._error(network, target, validation)
            facts: dict[str, Json] = {"losses": dict(course), "validation_mse": error}
            return network.state_dict(), facts

        spec = {
            **self.spec(),
            "target": target.identity,
            "auxiliary": auxiliary.identity,
            "validation": validation.identity,
        }
        artifact = shop.keep("decoder", spec, make)
        network.load_state_dict(artifact.tensors)
        self._network = network.eval()
        self._facts = {"validation_mse": artifact.facts["validation_mse"]}

    @torch.no_grad()
    def reconstruct(self, shares: Shares) -> Tensor:
        """One forward pass."""
        assert self._network is not None, "prepare() comes first"
        images: Tensor = self._network(shares)
        return images

    def facts(self) -> dict[str, Json]:
        """Mean squared error on the attacker's validation images."""
        return self._facts

    def _some(self, images: ImageSet) -> Iterator[Tensor]:
        """Yields the first images, no more at once than memory surely holds."""
        size = images_at_once(self.workshop.image_shape)
        for chunk in images.take(STATISTICS).chunks(size):
            yield chunk.to(self.workshop.device)

    @torch.no_grad()
    def _error(self, network: InverseNetwork, target: Target, images: ImageSet) -> float:
        network.eval()
        total, count = 0.0, 0
        for some in self._some(images):
            total += len(some) * F.mse_loss(network(target.query(some)), some).item()
            count += len(some)
        return total / count
