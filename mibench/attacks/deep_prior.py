"""Inversion with an untrained network as prior, one network per image, all of them at once."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.budget import images_at_once, split
from mibench.attacks.descent import Descent, Moment, Schedule, descend
from mibench.attacks.gradient import misfit, total_variation
from mibench.attacks.tuning import best_descent
from mibench.data.sets import ImageSet
from mibench.defenses.base import Shares
from mibench.files import Json
from mibench.registry import attacks
from mibench.threat import Knowledge, Target

INPUT = 0.1
"""Deviation of the networks' fixed input, as of Ulyanov et al."""
LEVELS = ((0.5, 0.5), (0.75, 0.2), (0.875, 0.1))
"""Until which share of the steps the input is disturbed, and by how much of its own deviation."""
LEAST_SIDE = 4
"""Maps are not halved below this side."""
FAINT = 0.02
"""Contrast of the first images: nearly grey. From a picture of full contrast the descent finds no
way to the message of a client that has squeezed its features."""
LAYERS = 4
"""Times that an image's activations in these networks outweigh those that `budget` reckons with."""


@attacks.register("deep-prior", knowledge="white_box", paper="Ulyanov et al., CVPR 2018")
class DeepPrior(Attack):
    """min over theta of E(f_theta(eta); z), x = f_theta(eta): a network per image, never trained.

    f is a convolutional hourglass with random weights theta and a fixed random input eta; what it
    makes early is smooth and self-similar, as photographs are. E is -log p(z | client(x)) / dim(z)
    + w TV(x), with the defense's own law and w chosen for every target on the attacker's validation
    images. The input is disturbed ever less, and not at all at the end.

    Ulyanov et al. stop by eye, and codes that use their prior for inversion keep the iterate
    nearest to the true image. No attacker can do that. Here the number of steps is fixed, and the
    answer is the mean of the last iterates. Their networks of 2 million weights and thousands of
    steps are cut to what many images at once allow: fewer and narrower maps (ours). Normalisation
    is per image, as theirs is with one image in the batch.
    """

    knowledge = Knowledge.WHITE_BOX

    class Params(Attack.Params):
        """Size of the networks, budget of the descent, and the grid of the prior's weight."""

        steps: int = Field(default=300, gt=0, le=100_000, description="steps of Adam")
        lr: float = Field(default=0.01, gt=0, le=1, description="peak learning rate")
        width: int = Field(default=16, gt=0, le=512, description="channels of every map")
        scales: int = Field(default=3, gt=0, le=8, description="times that maps are halved")
        averaged: float = Field(
            default=0.1, gt=0, le=1, description="share of the last steps whose mean is the answer"
        )
        weights: tuple[float, ...] = Field(
            default=(0.01, 0.1, 1.0, 10.0), min_length=1, description="grid of w"
        )
        tuning_images: int = Field(default=8, gt=0, description="validation images per weight")

    params: Params

    def __init__(self, params: Params, workshop: Workshop) -> None:
        super().__init__(params, workshop)
        self._networks = Hourglasses(workshop.image_shape, params.width, params.scales)
        self._target: Target | None = None
        self._weight = 0.0
        self._facts: dict[str, Json] = {}

    @classmethod
    def budget(cls, params: Any) -> tuple[str, ...]:  # noqa: ARG003
        """The descent's steps."""
        return ("steps",)

    def prepare(self, target: Target, auxiliary: ImageSet, validation: ImageSet) -> None:
        """Chooses the weight of the total variation on validation images."""
        self._target = target

        def make(_: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            some = validation.take(self.params.tuning_images).images().to(self.workshop.device)
            with seeding.stream(self.workshop.seed, "deep prior tuning"):
                return {}, best_descent(
                    some, target.query(some), self.params.weights, self._descend, self._size()
                )

        spec = self.spec_of(target, auxiliary, validation)
        self._facts = self.workshop.keep("tuning", spec, make).facts
        self._weight = float(self._facts["weight"])  # type: ignore[arg-type]

    def reconstruct(self, shares: Shares) -> Tensor:
        """Fits one network per image and returns the mean of its last images."""

        def work(part: slice) -> Tensor:
            own = tuple(share[part] for share in shares)
            weights = torch.full((len(own[0]),), self._weight, device=own[0].device)
            return self._descend(own, weights)[0]

        return split(work, len(shares[0]), self._size())

    def facts(self) -> dict[str, Json]:
        """The chosen weight, the validation error of each, and the course of the objective."""
        return self._facts

    def _size(self) -> int:
        return max(1, images_at_once(self.workshop.image_shape, self.workshop.device) // LAYERS)

    def _descend(self, shares: Shares, weights: Tensor) -> tuple[Tensor, Descent]:
        assert self._target is not None, "prepare() comes first"
        target, params, networks = self._target, self.params, self._networks
        device, count = weights.device, len(weights)
        values = sum(share[0].numel() for share in shares)
        # Image by image, so that no draw depends on how the images are grouped.
        drawn, noise = [], []
        for _ in range(count):
            drawn.append(networks.draw())
            noise.append(torch.Generator().manual_seed(int(torch.randint(2**62, ()))))
        start = [torch.stack(parts).to(device) for parts in zip(*drawn, strict=True)]
        fixed, start = start[0], start[1:]
        last = max(1, round(params.averaged * params.steps))
        total = torch.zeros(count, *self.workshop.image_shape, device=device)
        seen = torch.zeros(count, 1, 1, 1, device=device)

        def objective(theta: list[Tensor], moment: Moment) -> Tensor:
            rows, eta = moment.rows, fixed[moment.rows]
            level = jitter(moment.step / params.steps)
            if level:
                draws = [torch.randn(fixed.shape[1:], generator=noise[row]) for row in rows]
                eta = eta + level * INPUT * torch.stack(draws).to(device)
            images = networks(theta, eta)
            if moment.step >= params.steps - last:
                total[rows] += images.detach()
                seen[rows] += 1
            received = tuple(share[rows] for share in shares)
            fit = misfit(target, received, images) / values
            return fit + weights[rows] * total_variation(images)

        schedule = Schedule(params.steps, params.lr)
        run = descend(start, objective, schedule, "Deep prior attack")
        # A network that diverged has left, or shows what is no number.
        images = torch.where(seen > 0, total / seen.clamp_min(1), 0.5).nan_to_num(nan=0.5)
        return images.clamp(0, 1), run


def jitter(progress: float) -> float:
    """Returns how much the input is disturbed at this share of the steps."""
    return next((level for until, level in LEVELS if progress < until), 0.0)


class Hourglasses:
    """Many hourglass networks of one shape, each with weights of its own, as grouped convolutions.

    Each scale down: a convolution of stride 2 and one of stride 1; each scale up: enlargement, the
    sum with what the way down had there, one convolution; every convolution is 3x3 and followed by
    a normalisation per image and channel and a leaky ReLU; a last one of 1x1 and a sigmoid.

    Args:
        image_shape: (3, H, W).
        width: channels of every map.
        scales: times that maps are halved, fewer where they would get smaller than `LEAST_SIDE`.
    """

    def __init__(self, image_shape: tuple[int, int, int], width: int, scales: int) -> None:
        channels, height, width_of_image = image_shape
        self.width = width
        self.sizes = [(height, width_of_image)]
        while len(self.sizes) <= scales and min(self.sizes[-1]) >= 2 * LEAST_SIDE:
            self.sizes.append((math.ceil(self.sizes[-1][0] / 2), math.ceil(self.sizes[-1][1] / 2)))
        self.convolutions = 1 + 3 * (len(self.sizes) - 1)
        self.outputs = channels

    def draw(self) -> list[Tensor]:
        """Draws one network from PyTorch's global state: its input and then its weights."""
        inputs = INPUT * torch.randn(self.width, *self.sizes[0])
        fan = 9 * self.width
        layers = math.sqrt(2 / fan) * torch.randn(self.convolutions, self.width, self.width, 3, 3)
        gains = torch.ones(self.convolutions, self.width)
        exit_weights = FAINT * torch.randn(self.outputs, self.width, 1, 1) / math.sqrt(self.width)
        exit_shifts = torch.zeros(self.outputs)
        return [inputs, layers, gains, torch.zeros_like(gains), exit_weights, exit_shifts]

    def __call__(self, theta: list[Tensor], inputs: Tensor) -> Tensor:
        """Returns images (B, 3, H, W) in [0, 1].

        Args:
            theta: what `draw` returns behind the input, each with the batch axis first.
            inputs: (B, width, H, W).
        """
        layers, gains, shifts, exit_weights, exit_shifts = theta
        at = iter(range(self.convolutions))

        def layer(x: Tensor, stride: int = 1) -> Tensor:
            place = next(at)
            x = _convolved(F.pad(x, (1, 1, 1, 1), mode="replicate"), layers[:, place], stride)
            x = F.instance_norm(x)
            scale, shift = gains[:, place], shifts[:, place]
            return F.leaky_relu(x * scale[..., None, None] + shift[..., None, None], 0.2)

        x = layer(inputs)
        passed = [x]
        for _ in self.sizes[1:]:
            x = layer(layer(x, stride=2))
            passed.append(x)
        for below in passed[-2::-1]:
            x = layer(F.interpolate(x, size=below.shape[2:], mode="bilinear") + below)
        return (_convolved(x, exit_weights) + exit_shifts[..., None, None]).sigmoid()


def _convolved(x: Tensor, weights: Tensor, stride: int = 1) -> Tensor:
    """Convolves each image (B, C, H, W) with its own weights (B, O, C, k, k)."""
    count = len(x)
    folded = F.conv2d(x.flatten(0, 1)[None], weights.flatten(0, 1), stride=stride, groups=count)
    return folded.view(count, -1, *folded.shape[2:])
