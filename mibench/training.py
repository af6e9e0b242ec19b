"""The one training loop: models, defenses, decoders and priors all learn through `optimise`."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
JUDGED = "judged"
"""Name in the history under which steps done and error of each judgement are kept."""


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


@dataclass(frozen=True)
class Judging:
    """How a training is judged, on images that it does not learn from, to keep its best state.

    Attributes:
        error: a module that learns, with the weights that would be used → what is to be small.
            Called in evaluation mode, without gradients, on a copy.
        every: steps between two judgements; the last step is always judged.
        patience: the training ends after so many judgements in a row without a better one; None:
            never.
    """

    error: Callable[[nn.Module], float]
    every: int
    patience: int | None = None


def optimise(
    module: nn.Module,
    losses: Callable[[Step], Losses],
    recipe: Recipe,
    *,
    seed: int,
    checkpoint: Checkpoint,
    title: str,
    judging: Judging | None = None,
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
        judging: keeps the best of the judged states instead of the last one.

    Returns:
        The course of each loss term, and under `JUDGED` that of the judgements.

    Raises:
        DivergedError: the loss became infinite or not a number. The checkpoint then holds the last
            state that was seen to be good.
    """
    device = next(module.parameters()).device
    parameters = [p for p in module.parameters() if p.requires_grad]
    run = _Run(module, _optimiser(parameters, recipe), recipe.average, judging)
    first = run.resume(checkpoint)
    good = run.state(first)
    module.train()
    with progress.task(title, total=recipe.steps) as task:
        task.advance(first)
        for index in range(first, recipe.steps):
            if run.given_up:
                break
            stream = seeding.generator(seed, "step", index)
            for group in run.optimiser.param_groups:
                group["lr"] = recipe.lr * _rate(index, recipe)
            with seeding.stream(seed, "global", index), autocast(device, recipe.precision):
                terms = losses(Step(index, recipe.steps, stream))
                loss = torch.stack([term.float() for term in terms.values()]).sum()
            value, noted = loss.item(), index % max(recipe.steps // 50, 1) == 0
            if not math.isfinite(value):
                checkpoint.save(*good)
                raise DivergedError(_diverged(title, index, terms, good[1]))
            last = index == recipe.steps - 1
            if noted or last:
                for name, term in terms.items():
                    run.history.setdefault(name, []).append([index, term.item()])
            if noted:
                good = run.state(index)
            run.optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            if recipe.clip is not None:
                nn.utils.clip_grad_norm_(parameters, recipe.clip)
            run.optimiser.step()
            run.average_in(index)
            if judging is not None and (last or (index + 1) % judging.every == 0):
                run.judge(index + 1, title)
            task.advance(loss=value)
            # The last one too: what comes behind the training can be interrupted as well.
            if checkpoint.due() or last or run.given_up:
                checkpoint.save(*run.state(index + 1))
    module.load_state_dict(run.used())
    module.eval()
    return run.history


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


@dataclass
class _Run:
    """All that a training goes on from: what learns, its optimiser, averages and best state."""

    module: nn.Module
    optimiser: torch.optim.Optimizer
    decay: float | None
    judging: Judging | None
    mean: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    history: History = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.decay:
            self.mean = _copied(self.module.state_dict())

    @torch.no_grad()
    def average_in(self, index: int) -> None:
        """Adds the weights behind step ``index`` to their moving average, if there is one."""
        if not self.decay:
            return
        decay = min(self.decay, (1 + index) / (10 + index))
        for name, value in self.module.state_dict().items():
            if value.is_floating_point():
                self.mean[name].lerp_(value, 1 - decay)
            else:
                self.mean[name].copy_(value)

    def used(self) -> Mapping[str, Tensor]:
        """The weights that would be used if the training ended now."""
        return self.best or self.mean or self.module.state_dict()

    @torch.no_grad()
    def judge(self, step: int, title: str) -> None:
        """Judges the weights behind ``step`` steps, and keeps them if none were as good."""
        assert self.judging is not None
        weights = self.mean or self.module.state_dict()
        judged = copy.deepcopy(self.module).eval()
        judged.load_state_dict(weights)
        error = self.judging.error(judged)
        if not math.isfinite(error):
            raise DivergedError(
                f"{title} diverged before step {step}: its error on validation images is {error}. "
                "Lower the learning rate."
            )
        course = self.history.setdefault(JUDGED, [])
        if all(error < other for _, other in course):
            self.best = _copied(weights)
        course.append([step, error])

    @property
    def given_up(self) -> bool:
        """Whether the last judgements were worse than one before, as many as patience allows."""
        if self.judging is None or self.judging.patience is None:
            return False
        errors = [error for _, error in self.history.get(JUDGED, [])]
        return bool(errors) and len(errors) - 1 - errors.index(min(errors)) >= self.judging.patience

    def state(self, step: int) -> tuple[dict[str, Tensor], dict[str, Json]]:
        """A copy of everything, as a checkpoint takes it."""
        tensors = {f"module.{k}": v for k, v in self.module.state_dict().items()}
        tensors |= {f"mean.{k}": v for k, v in self.mean.items()}
        tensors |= {f"best.{k}": v for k, v in self.best.items()}
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{k}": torch.as_tensor(v) for k, v in state.items()}
        history: Json = {k: list(v) for k, v in self.history.items()}
        return _copied(tensors), {"step": step, "history": history}

    def resume(self, checkpoint: Checkpoint) -> int:
        """Takes over what a checkpoint holds, if anything; returns the steps done."""
        saved = checkpoint.load()
        if saved is None:
            return 0
        tensors, facts = saved
        parts: dict[str, dict[str, Tensor]] = {
            "module": {},
            "mean": {},
            "best": {},
            "optimiser": {},
        }
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.module.load_state_dict(parts["module"])
        for name, value in parts["mean"].items():
            self.mean[name].copy_(value)
        self.best = parts["best"]
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["optimiser"].items():
            number, _, key = name.partition(".")
            state.setdefault(int(number), {})[key] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.history.update(facts["history"])  # type: ignore[arg-type]
        progress.note(f"going on from step {facts['step']} of an interrupted run")
        return int(facts["step"])  # type: ignore[arg-type]


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
