"""Decoder inversion: a network that maps shares to images, trained on auxiliary images."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.data.base import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.protocol import Recipe
from mibench.registry import attacks
from mibench.threat import Knowledge, Target
from mibench.training import Losses, Step, augment, optimise, shuffled_batch

STATISTICS = 1024
"""Auxiliary images that set the standardisation of the decoder's input."""
AVERAGE = 0.998
"""Decay of the weights' moving average."""


@attacks.register("decoder", knowledge="black_box", paper="He et al., ACSAC 2019")
class Decoder(Attack):
    """min_g E |g(z) - x|^2 over auxiliary images x and the deployed client's shares z of them.

    He et al. train a mirror image of the client. Departures, so that no defense meets a weaker
    decoder because its shares are smaller: one residual network of fixed width for every defense,
    of which only the first layer follows the shares' shape; sigmoid output; a moving average of the
    weights. A randomised client is queried anew at every step, so the decoder learns the mean over
    its randomness.
    """

    knowledge = Knowledge.BLACK_BOX

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
            weight_decay=1e-4, warmup=0.05, crop=0,
        )  # fmt: skip

        seed = seeding.derive(shop.seed, "decoder training")

        def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            with seeding.stream(shop.seed, "decoder statistics"):
                some = auxiliary.take(STATISTICS).images().to(shop.device)
                network.standardise(target.query(some))

            def losses(step: Step) -> Losses:
                index = shuffled_batch(len(auxiliary), params.batch, seed, step.index)
                images = auxiliary.images(index).to(shop.device)
                images = augment(images, recipe, step.generator)
                return {"mse": F.mse_loss(network(target.query(images)).float(), images)}

            facts = optimise(
                network, losses, recipe, seed=seed, checkpoint=checkpoint,
                title="Training decoder", average=AVERAGE,
            )  # fmt: skip
            with seeding.stream(shop.seed, "decoder validation"):
                facts["validation_mse"] = self._error(network, target, validation)
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

    @torch.no_grad()
    def _error(self, network: InverseNetwork, target: Target, images: ImageSet) -> float:
        some = images.take(STATISTICS).images().to(self.workshop.device)
        network.eval()
        return F.mse_loss(network(target.query(some)), some).item()


class InverseNetwork(nn.Module):
    """Shares → image: an input layer per share, residual blocks at half resolution, pixel shuffle.

    Args:
        share_shapes: shape of each share without the batch axis: maps (C, h, w), or vectors (n,).
        image_shape: (3, H, W), H and W even.
        width: channels of the residual blocks.
        blocks: number of residual blocks.
    """

    def __init__(
        self,
        share_shapes: list[tuple[int, ...]],
        image_shape: tuple[int, int, int],
        width: int,
        blocks: int,
    ) -> None:
        super().__init__()
        channels, height, _ = image_shape
        self.entries = nn.ModuleList(ShareEntry(s, width, height // 2) for s in share_shapes)
        self.blocks = nn.Sequential(*(ConvBlock(width) for _ in range(blocks)))
        self.exit = nn.Conv2d(width, 4 * channels, 3, padding=1, padding_mode="replicate")

    @torch.no_grad()
    def standardise(self, shares: Shares) -> None:
        """Sets mean and deviation of each input from a batch of shares."""
        for entry, share in zip(self.entries, shares, strict=True):
            assert isinstance(entry, ShareEntry)
            entry.standardise(share)

    def forward(self, shares: Shares) -> Tensor:
        """Returns images (B, 3, H, W) in [0, 1]."""
        entered = [entry(share) for entry, share in zip(self.entries, shares, strict=True)]
        features = self.blocks(torch.stack(entered).sum(0))
        return F.pixel_shuffle(self.exit(features), 2).sigmoid()


class ShareEntry(nn.Module):
    """Brings one share to (width, size, size): convolution for maps, a linear layer otherwise."""

    mean: Tensor
    std: Tensor

    def __init__(self, shape: tuple[int, ...], width: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.is_map = len(shape) == 3 and shape[-1] >= 4
        per_channel = (shape[0], 1, 1) if self.is_map else (torch.Size(shape).numel(),)
        self.register_buffer("mean", torch.zeros(per_channel))
        self.register_buffer("std", torch.ones(per_channel))
        self.layer: nn.Module
        if self.is_map:
            # A share with more than `size` positions a side is folded, never pooled: pooling would
            # throw away what it leaks.
            self.fold = max(1, -(-max(shape[1:]) // size))
            self.layer = nn.Conv2d(shape[0] * self.fold**2, width, 3, padding=1)
        else:
            self.fold = 1
            self.layer = nn.Linear(per_channel[0], width * 8 * 8)

    def standardise(self, share: Tensor) -> None:
        """Sets mean and deviation from a batch of this share."""
        axes = (0, 2, 3) if self.is_map else (0,)
        share = share if self.is_map else share.flatten(1)
        self.mean.copy_(share.mean(axes).view_as(self.mean))
        # A dead channel must not be blown up; it carries nothing.
        self.std.copy_(share.std(axes).clamp_min(1e-4).view_as(self.std))

    def forward(self, share: Tensor) -> Tensor:
        """Returns features (B, width, size, size)."""
        share = ((share if self.is_map else share.flatten(1)) - self.mean) / self.std
        if self.is_map:
            share = F.pad(share, (0, -share.shape[3] % self.fold, 0, -share.shape[2] % self.fold))
            out = self.layer(F.pixel_unshuffle(share, self.fold))
        else:
            out = self.layer(share).unflatten(1, (-1, 8, 8))
        return F.interpolate(out, size=(self.size, self.size), mode="nearest")


class ConvBlock(nn.Module):
    """Residual block without normalisation: x + conv(relu(conv(relu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape."""
        out: Tensor = self.conv2(F.relu(self.conv1(F.relu(x))))
        return x + out
