"""The judge: an independent classifier that tells what a reconstruction shows.

It is of another architecture than the target (plain convolutions), has learned from the auxiliary
images (never from the train or the private role), and is trained once for each protocol: its seed
does not follow the run's, so that all runs of a protocol are judged alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mibench import progress, seeding
from mibench.artifacts import ArtifactStore, Checkpoint
from mibench.data.roles import Roles
from mibench.deployment import TRAINING_SECONDS, hash_tensors
from mibench.files import Json
from mibench.protocol import JudgeRule, Protocol
from mibench.record import Component
from mibench.registry import fingerprint
from mibench.task import Task
from mibench.training import Step, augment, optimise, shuffled_batch

SEED = 20260101
"""Of the judge's weights and training, whatever the run's seed is."""
ROLE = "auxiliary"
"""Whose images the judge learns from."""
LARGEST_MAP = 56
"""Side in pixels of the first feature map at most."""
BLUR, NOISE = 0.05, 0.1
"""Largest deviations of what degrades images in training: of the blur, as a share of the images'
side, and of the noise."""
MIXED_TAPS = 13
"""Longest blur in mixed precision: from 15 taps on, oneDNN (seen in PyTorch 2.14) never ends making
the kernel of a depthwise convolution in bf16, where the processor has it. 32 pixels need 9 taps."""
_CHUNK = 128


class SmallVgg(nn.Module):
    """Convolutions, batch normalisation and pooling in one line, without any shortcut.

    Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition", ICLR 2015, with Ioffe and Szegedy's batch normalisation and a global mean instead
    of its wide linear layers.

    Args:
        side: height and width of the images in pixels; larger ones enter with a larger stride.
        outputs: number of logits.
        width: channels of the first layer; the features have eight times as many.
    """

    name = "small-vgg"
    version = 1

    def __init__(self, side: int, outputs: int, width: int) -> None:
        super().__init__()
        stride = 1
        while side / stride > LARGEST_MAP:
            stride *= 2
        self.features = nn.Sequential(
            *_layer(3, width, 2 * stride + 1, stride),
            *_layer(width, 2 * width),
            nn.MaxPool2d(2),
            *_layer(2 * width, 4 * width),
            nn.MaxPool2d(2),
            *_layer(4 * width, 4 * width),
            *_layer(4 * width, 8 * width),
            nn.MaxPool2d(2),
            *_layer(8 * width, 8 * width),
        )
        self.head = nn.Linear(8 * width, outputs)

    def embed(self, images: Tensor) -> Tensor:
        """Features (B, 8 width), not negative, of images (B, 3, H, W) in [0, 1]."""
        centred = (4 * images - 2).contiguous(memory_format=torch.channels_last)
        found: Tensor = self.features(centred)
        return found.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, outputs) of images (B, 3, H, W) in [0, 1]."""
        logits: Tensor = self.head(self.embed(images))
        return logits


@dataclass(frozen=True)
class Judge:
    """A trained judge.

    Attributes:
        network: in evaluation mode, on the device of the run.
        artifact: key in the cache.
        weights: hash of the weights.
        component: its architecture, for the record.
        facts: what training reported.
    """

    network: SmallVgg
    artifact: str
    weights: str
    component: Component
    facts: dict[str, Json]

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Features (N, D) in float64 on the CPU, of images (N, 3, H, W) in [0, 1]."""
        return torch.cat([self.network.embed(part).cpu().double() for part in self._parts(images)])

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits (N, outputs) on the CPU, of images (N, 3, H, W) in [0, 1]."""
        return torch.cat([self.network(part).float().cpu() for part in self._parts(images)])

    def _parts(self, images: Tensor) -> Iterator[Tensor]:
        device = next(self.network.parameters()).device
        return (part.to(device) for part in torch.split(images, _CHUNK))


def train_judge(
    rule: JudgeRule, protocol: Protocol, roles: Roles, store: ArtifactStore, device: str
) -> Judge:
    """Trains the judge on the auxiliary images, or takes it from the cache.

    Raises:
        DivergedError: its training has no finite loss; lower the learning rate in ``judge.recipe``.
    """
    side = roles.auxiliary.image_shape[-1]
    task = roles.task.smoothed(rule.recipe.smoothing)

    def build() -> SmallVgg:
        with seeding.stream(SEED, "judge"):
            return SmallVgg(side, task.outputs, rule.width)

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
        resumed, began = checkpoint.begun, time.perf_counter()
        learner = build().to(device).to(memory_format=torch.channels_last)
        history = optimise(
            learner,
            lambda step: {"task": _loss(learner, rule, roles, task, step)},
            rule.recipe,
            seed=seeding.derive(SEED, "training"),
            checkpoint=checkpoint,
            title="judge",
        )
        # Of a training that was interrupted, nobody has measured the whole.
        seconds = None if resumed else round(time.perf_counter() - began, 1)
        return learner.state_dict(), {"history": dict(history), TRAINING_SECONDS: seconds}

    # How many images an original is sought among changes nothing about who seeks it.
    params = rule.model_dump(mode="json", exclude={"gallery"})
    code = fingerprint(SmallVgg)
    spec: dict[str, Json] = {
        "judge": params,
        "code": [code, fingerprint(Step)],
        ROLE: roles.auxiliary.identity,
        "task": [type(task).__name__, task.outputs],
        "seed": SEED,
        "device": torch.device(device).type,
        "threads": protocol.threads,
        "torch": torch.__version__,
    }
    artifact = store.fetch("judge", spec, make)
    if artifact.reused:
        progress.note(f"reused the judge ({artifact.key[:8]})")
    network = build()
    network.load_state_dict(artifact.tensors)
    network.to(device).eval().requires_grad_(requires_grad=False)
    return Judge(
        network=network,
        artifact=artifact.key,
        weights=hash_tensors(artifact.tensors),
        component=Component(name=SmallVgg.name, version=SmallVgg.version, code=code, params=params),
        facts=artifact.facts,
    )


def _loss(learner: SmallVgg, rule: JudgeRule, roles: Roles, task: Task, step: Step) -> Tensor:
    """The task's loss on augmented auxiliary images, some of which are degraded."""
    device = next(learner.parameters()).device
    seed = seeding.derive(SEED, "training")
    chosen = shuffled_batch(len(roles.auxiliary), rule.recipe.batch, seed, step.index)
    images = augment(roles.auxiliary.images(chosen).to(device), rule.recipe, step.generator)
    images = degrade(images, rule.degraded, step.generator)
    return task.loss(learner(images), roles.auxiliary.labels[chosen].to(device))


def degrade(images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Blurs the first ``share`` of the images and adds noise to them, in one random strength each.

    A reconstruction is blurred or noisy more often than not. A judge that knows clean images alone
    overlooks what an eye still sees, and would make a defense look better than it is.

    Args:
        images: (B, 3, H, W) in [0, 1].
        share: in [0, 1].
        generator: CPU generator of the draws.
    """
    count = round(share * len(images))
    if not count:
        return images
    blur, noise = torch.rand(2, generator=generator).tolist()
    some, side = images[:count], min(images.shape[-2:])
    sigma = max(BLUR * side * blur, 1e-3)
    reach = min(math.ceil(2.5 * sigma), side - 1)
    steps = torch.arange(-reach, reach + 1, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-steps.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    full = torch.autocast(images.device.type, enabled=False)
    with full if len(steps) > MIXED_TAPS else nullcontext():
        wide = F.conv2d(F.pad(some, (reach, reach, 0, 0), mode="reflect"), kernel, groups=3)
        some = F.conv2d(F.pad(wide, (0, 0, reach, reach), mode="reflect"), kernel.mT, groups=3)
    draws = torch.randn(some.shape, generator=generator).to(images.device)
    return torch.cat([(some + NOISE * noise * draws).clamp(0, 1), images[count:]])


def _layer(channels: int, wider: int, kernel: int = 3, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(channels, wider, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(wider),
        nn.ReLU(inplace=True),
    )
