"""The one training loop: models, defenses, decoders and priors all learn through `optimise`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mibench import progress, seeding
from mibench.artifacts import Checkpoint
from mibench.errors import DivergedError
from mibench.files import Json
from mibench.protocol import Recipe

Losses = Mapping[str, Tensor]
History = dict[str, list[list[float]]]
"""Step and value of each loss term, at up to 50 evenly spaced steps."""


@dataclass(frozen=True)
class Step:
    """Where training stands.

    Attributes:
        index: number of this step, from 0.
        total: number of all steps.
        generator: CPU generator of this step's own random draws.
        phase: name of the phase of the training, see `mibench.defenses.base.Phase`.
    """

    index: int
    total: int
    generator: torch.Generator
    phase: str = "training"

    @property
    def progress(self) -> float:
        """Share of the training that is done, in [0, 1)."""
        return self.index / self.total


def optimise(
    module: nn.Module,
    losses: Callable[[Step], Losses],
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Checkpoint,
    title: str,
) -> History:
    """Minimises the sum of named losses over the module's parameters, in place.

    The learning rate rises linearly over ``recipe.warmup`` of the steps and falls to zero on a
    cosine. Every draw of step i comes from the stream (seed, i), so a run that was killed and goes
    on from its checkpoint ends where an undisturbed run ends.

    Args:
        module: what learns; left in evaluation mode.
        losses: named terms of one step; their sum is minimised.
        recipe: optimiser, rates, steps and precision.
        seed: of the step streams.
        checkpoint: where the state is kept while training.
        title: what the progress bar says.

    Returns:
        The course of each loss term.

    Raises:
        DivergedError: the loss became infinite or not a number. The checkpoint then holds the last
            state that was seen to be good.
    """
    device, average = next(module.parameters()).device, recipe.average
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser = _optimiser(parameters, recipe)
    mean = {k: v.detach().clone() for k, v in module.state_dict().items()} if average else {}
    history: History = {}
    first = _resume(module, optimiser, mean, history, checkpoint)
    good = _state(module, optimiser, mean, history, first)
    module.train()
    with progress.task(title, total=recipe.steps) as task:
        task.advance(first)
        for index in range(first, recipe.steps):
            stream = seeding.generator(seed, "step", index)
            for group in optimiser.param_groups:
                group["lr"] = recipe.lr * _rate(index, recipe)
            with seeding.stream(seed, "global", index), autocast(device, recipe.precision):
                terms = losses(Step(index, recipe.steps, stream))
                loss = torch.stack([term.float() for term in terms.values()]).sum()
            value, noted = loss.item(), index % max(recipe.steps // 50, 1) == 0
            if not math.isfinite(value):
                checkpoint.save(*good)
                raise DivergedError(_diverged(title, index, terms, good[1]))
            if noted or index == recipe.steps - 1:
                for name, term in terms.items():
                    history.setdefault(name, []).append([index, term.item()])
            if noted:
                good = _state(module, optimiser, mean, history, index)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            optimiser.step()
            if average:
                _average(mean, module, average, index)
            task.advance(loss=value)
            # The last one too: what comes behind the training can be interrupted as well.
            if checkpoint.due() or index == recipe.steps - 1:
                checkpoint.save(*_state(module, optimiser, mean, history, index + 1))
    if average:
        module.load_state_dict(mean)
    module.eval()
    return history


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the mixed-precision context of a recipe: bf16 where asked for and at hand."""
    enabled = precision == "bf16" and computes_bf16(device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def computes_bf16(device: torch.device) -> bool:
    """Says whether the device computes in bf16 itself; emulation would be slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return True
    flags = Path("/proc/cpuinfo")
    # Where the system does not say, as on a Mac, bf16 is common today.
    return not flags.is_file() or "bf16" in flags.read_text(encoding="utf-8", errors="replace")


def shuffled_batch(count: int, batch: int, seed: int, index: int) -> Tensor:
    """Returns the image indices of training step ``index``: epochs of fresh permutations."""
    batch = min(batch, count)
    epoch, at = divmod(index * batch, count - count % batch)
    order = torch.randperm(count, generator=seeding.generator(seed, "epoch", epoch))
    return order[at : at + batch]


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Flips each image with probability one half, shifts or zooms it, as the recipe says.

    Args:
        images: (B, 3, H, W) in [0, 1]; borders are continued by reflection.
        recipe: which augmentations to use.
        generator: CPU generator of the draws.
    """
    count, _, height, width = images.shape
    if recipe.flip:
        flipped = torch.rand(count, generator=generator) < 0.5
        images = torch.where(flipped.to(images.device)[:, None, None, None], images.flip(3), images)
    if recipe.zoom is not None:
        images = _zoomed(images, recipe.zoom, generator)
    if recipe.crop:
        pad = recipe.crop
        padded = F.pad(images, (pad, pad, pad, pad), mode="reflect")
        shift = torch.randint(0, 2 * pad + 1, (2, count), generator=generator).to(images.device)
        rows = shift[0][:, None] + torch.arange(height, device=images.device)
        columns = shift[1][:, None] + torch.arange(width, device=images.device)
        at = torch.arange(count, device=images.device)[:, None, None]
        images = padded[at, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    return images


def _zoomed(images: Tensor, least: float, generator: torch.Generator) -> Tensor:
    """Cuts a random square of ``least`` to 1 of the area out of each image and enlarges it."""
    draws = torch.rand(3, len(images), generator=generator).to(images.device)
    side = (least + (1 - least) * draws[0]).sqrt()
    theta = torch.zeros(len(images), 2, 3, device=images.device)
    theta[:, 0, 0] = theta[:, 1, 1] = side
    theta[:, :, 2] = ((2 * draws[1:] - 1) * (1 - side)).T
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _optimiser(parameters: list[nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    # Biases, norm gains and mask logits (one axis or less) are not pulled to zero.
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=recipe.lr)


def _rate(index: int, recipe: Recipe) -> float:
    warm = max(recipe.warmup * recipe.steps, 1)
    if index < warm:
        return (index + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (index - warm) / max(recipe.steps - warm, 1)))


@torch.no_grad()
def _average(mean: dict[str, Tensor], module: nn.Module, decay: float, index: int) -> None:
    decay = min(decay, (1 + index) / (10 + index))
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            mean[name].lerp_(value, 1 - decay)
        else:
            mean[name].copy_(value)


def _diverged(title: str, index: int, terms: Losses, good: Mapping[str, Json]) -> str:
    found = {name: term.item() for name, term in terms.items()}
    broken = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
    # Finite terms can have an infinite sum.
    named = broken or [f"{name} is {value:.3g}" for name, value in found.items()]
    return (
        f"{title} diverged at step {index}: the loss term {', '.join(named)}. Lower the learning "
        "rate or the weight of that term, or set recipe.clip. The state of step "
        f"{good['step']}, the last good one, is kept as checkpoint."
    )


def _state(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    mean: Mapping[str, Tensor],
    history: History,
    step: int,
) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """A copy of all that the training goes on from, as a checkpoint takes it."""
    tensors = {f"module.{k}": v for k, v in module.state_dict().items()}
    tensors |= {f"mean.{k}": v for k, v in mean.items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{number}.{k}": torch.as_tensor(v) for k, v in state.items()}
    copied = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    return copied, {"step": step, "history": {k: list(v) for k, v in history.items()}}


def _resume(
    module: nn.Module,
    optimiser: torch.optim.Optimizer,
    mean: dict[str, Tensor],
    history: History,
    checkpoint: Checkpoint,
) -> int:
    saved = checkpoint.load()
    if saved is None:
        return 0
    tensors, facts = saved
    parts: dict[str, dict[str, Tensor]] = {"module": {}, "mean": {}, "optimiser": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = value
    module.load_state_dict(parts["module"])
    for name, value in parts["mean"].items():
        mean[name].copy_(value)
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in parts["optimiser"].items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    history.update(facts["history"])  # type: ignore[arg-type]
    progress.note(f"going on from step {facts['step']} of an interrupted run")
    return int(facts["step"])  # type: ignore[arg-type]
