"""Speed of the gradient attack: all images at once against a plain loop over single images.

The loop does what published codes do: one image at a time, a network whose parameters track
gradients, and a few numbers printed at every iteration. Both sides run in one process on the same
model and images, turn by turn, so that a busy machine slows both. `benchmarks/README.md` says what
each table means.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mibench import seeding
from mibench.artifacts import ArtifactStore, Checkpoint
from mibench.attacks.base import Workshop
from mibench.attacks.descent import BETAS, EPS, Moment, Schedule, descend
from mibench.attacks.gradient import Gradient
from mibench.data.roles import load_roles
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense
from mibench.deployment import build_defense
from mibench.job import Job
from mibench.protocol import load_protocol
from mibench.task import Classification
from mibench.threat import Adversary, Knowledge, Target
from mibench.training import autocast

PROTOCOL = "cifar10-he2019-relu22-v1"
SHAPE = (3, 32, 32)
LR, TV = 1e-2, 10.0
"""Rate and weight of He et al. for ReLU22; both sides descend from grey on the pixels."""
PUBLISHED = 5000
"""Their iterations."""


@dataclass(frozen=True)
class Setting:
    """The model under attack, the images, and where it all runs."""

    target: Target
    model: Defense
    images: Tensor
    device: torch.device


def main(arguments: list[str] | None = None) -> None:
    """Runs all parts and prints their tables."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    setting = _setting(options, device)
    print(f"{PROTOCOL}, {device}, {options.threads} thread(s), PyTorch {torch.__version__}\n")
    single = equal_iterations(setting, options.iterations, options.rounds)
    equal_score(setting, options.published, single)
    growth_with_images(setting, options.counts, options.growth)
    growth_with_servers(setting, options.servers, options.growth)


def equal_iterations(setting: Setting, iterations: int, rounds: int) -> float:
    """Prints both sides at equal iterations; returns the loop's seconds per iteration and image."""
    (shares,) = setting.target.query(setting.images)
    count = len(shares)
    seconds: dict[str, list[float]] = {"loop": [], "batched": [], "batched bf16": []}
    found: dict[str, Tensor] = {}
    for place in range(min(rounds, count)):
        spent, image = timed(
            lambda at=place: loop(setting.model, shares[at : at + 1], iterations), setting.device
        )
        seconds["loop"].append(spent)
        found["loop"] = torch.cat([found["loop"], image]) if "loop" in found else image
        for name, precision in (("batched", "fp32"), ("batched bf16", "bf16")):
            spent, found[name] = timed(
                lambda p=precision: batched(setting.target, shares, iterations, p), setting.device
            )
            seconds[name].append(spent / count)
    both = len(found["loop"])
    print(f"Equal iterations: {iterations}, {count} images at once, {both} in the loop")
    print("| | s per image | ratio (median of turns) | PSNR, dB | greatest difference |")
    print("| --- | --- | --- | --- | --- |")
    for name, one in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(seconds["loop"], one, strict=True))
        score = psnr(found[name][:both], setting.images[:both])
        apart = (found[name][:both] - found["loop"]).abs().max().item()
        print(
            f"| {name} | {statistics.median(one):.3f} | {ratio:.2f} | {score:.2f} | {apart:.1e} |"
        )
    print()
    return statistics.median(seconds["loop"]) / iterations


def equal_score(setting: Setting, published: int, single: float) -> None:
    """Prints how soon our attack reaches the score that the loop has after ``published`` steps.

    The loop's images are those of the batched run of the same mathematics; see the first table.
    The truth only says when to stop the clock: every run has a fixed number of steps.
    """
    shares = setting.target.query(setting.images)
    wanted = psnr(batched(setting.target, shares[0], published), setting.images)
    loop_seconds = single * published
    print(f"Equal score: the loop has {wanted:.2f} dB after {published} iterations, "
          f"{loop_seconds:.1f} s per image")  # fmt: skip
    print("| steps of our attack | s per image | PSNR, dB | the loop takes so many times as long |")
    print("| --- | --- | --- | --- |")
    for precision in ("fp32", "mixed"):
        for steps in (10, 20, 40, 80, 160, 320):
            attack = ours(setting, steps, precision)
            spent, images = timed(lambda one=attack: one.reconstruct(shares), setting.device)
            score, spent = psnr(images, setting.images), spent / len(images)
            print(
                f"| {steps}, {precision} | {spent:.3f} | {score:.2f} | {loop_seconds / spent:.0f} |"
            )
            if score >= wanted:
                break
    print()


def growth_with_images(setting: Setting, counts: list[int], iterations: int) -> None:
    """Prints the time per image and iteration for more and more images at once."""
    print("| images at once | ms per image and iteration |\n| --- | --- |")
    for count in counts:
        images = setting.images.repeat(-(-count // len(setting.images)), 1, 1, 1)[:count]
        (shares,) = setting.target.query(images)
        spent, _ = timed(lambda s=shares: batched(setting.target, s, iterations), setting.device)
        print(f"| {count} | {1e3 * spent / count / iterations:.2f} |")
    print()


def growth_with_servers(setting: Setting, servers: int, iterations: int) -> None:
    """Prints the time against ever larger coalitions of the servers of a sharing defense."""
    defense = build("privdfs", {"servers": servers}).to(setting.device)
    print(f"| servers of {servers} that the adversary reads | ms per image and iteration |")
    print("| --- | --- |")
    for together in range(1, servers + 1):
        adversary = Adversary(Knowledge.WHITE_BOX, tuple(range(together)))
        against = Setting(
            Target(defense, adversary, "servers"), defense, setting.images, setting.device
        )
        attack, shares = ours(against, iterations), against.target.query(setting.images)
        spent, _ = timed(lambda a=attack, s=shares: a.reconstruct(s), setting.device)
        print(f"| {together} | {1e3 * spent / len(setting.images) / iterations:.2f} |")


def loop(model: Defense, share: Tensor, iterations: int) -> Tensor:
    """Rebuilds one image as published codes do."""
    x = torch.full((1, *SHAPE), 0.5, device=share.device, requires_grad=True)
    optimiser = torch.optim.Adam([x], lr=LR, betas=BETAS, eps=EPS)
    with Path(os.devnull).open("w", encoding="utf-8") as log:  # what such a code would print
        for _ in range(iterations):
            optimiser.zero_grad()
            model.zero_grad()
            features = F.mse_loss(model.predict(x)[0], share)
            variation = squared_variation(x).sum()
            loss = features + TV * variation
            loss.backward()
            optimiser.step()
            print(features.item(), variation.item(), loss.item(), file=log)
    return x.detach().clamp(0, 1)


def batched(target: Target, shares: Tensor, iterations: int, precision: str = "fp32") -> Tensor:
    """Rebuilds all images at once by the same mathematics, through the package's own descent."""

    def objective(found: list[Tensor], moment: Moment) -> Tensor:
        (x,) = found
        if precision == "bf16":
            x = x.contiguous(memory_format=torch.channels_last)
        with autocast(x.device, precision):
            (predicted,) = target.client(x)
        features = (predicted.float() - shares[moment.rows]).square().flatten(1).mean(1)
        return features + TV * squared_variation(x)

    start = torch.full((len(shares), *SHAPE), 0.5, device=shares.device)
    # The rate stays as it is to the last step, as in the loop.
    schedule = Schedule(iterations, LR, cooling=0.0)
    return descend([start], objective, schedule, "Batched").values[0].clamp(0, 1)


def squared_variation(x: Tensor) -> Tensor:
    """Mean squared difference of neighbours per image, (B,)."""
    down = (x[..., 1:, :] - x[..., :-1, :]).square().flatten(1).mean(1)
    right = (x[..., 1:] - x[..., :-1]).square().flatten(1).mean(1)
    return down + right


def ours(setting: Setting, steps: int, precision: str = "fp32") -> Gradient:
    """Our attack with one start, and its weight chosen on other images."""
    parameters = Gradient.Params(
        steps=steps, restarts=1, precision=precision, tuning_images=2, weights=(1.0, 100.0)
    )
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(SHAPE, 0, setting.device, ArtifactStore(Path(folder)), 1)
        attack = Gradient(parameters, shop)
        other = synthetic(2, seed=1)
        attack.prepare(setting.target, other, other)
    return attack


def timed(work: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Returns the seconds that some work took, and its result; see `clock`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = clock(device)
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock(device) - began, result


def clock(device: torch.device) -> float:
    """Seconds: of the core on a CPU with one thread, as others may use it too; else of the wall."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def psnr(images: Tensor, truth: Tensor) -> float:
    """Mean over images of the PSNR, in dB."""
    errors = (images - truth).square().flatten(1).mean(1)
    return float((-10 * errors.log10()).mean())


def synthetic(count: int, seed: int = 0) -> ImageSet:
    """Smooth random images with some fine structure."""
    draws = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, *SHAPE)
    for side, contrast in ((2, 0.4), (4, 0.3), (8, 0.2), (16, 0.1)):
        coarse = torch.rand(count, 3, side, side, generator=draws)
        images += contrast * F.interpolate(coarse, SHAPE[1:], mode="bilinear")
    return ImageSet((images * 255).round().to(torch.uint8), torch.zeros(count, dtype=torch.int64))


def build(name: str, values: dict[str, int]) -> Defense:
    """Builds a defense on the protocol's split, with initial weights."""
    job = Job(load_protocol(PROTOCOL), name, "gradient", values, {})
    classes = Classification(tuple(f"class {index}" for index in range(10)))
    return build_defense(job, SHAPE, classes).eval()


def _setting(options: argparse.Namespace, device: torch.device) -> Setting:
    protocol = load_protocol(PROTOCOL)
    model = build("none", {}).to(device)
    train, chosen = synthetic(2048, seed=2), synthetic(options.images)
    if options.data:
        roles = load_roles(protocol.data, options.data, Path(tempfile.mkdtemp()))
        train, chosen = roles.train, roles.validation.take(options.images)
    if options.train:
        recipe = protocol.recipe.model_copy(update={"steps": options.train})
        with tempfile.TemporaryDirectory() as folder, seeding.stream(0, "benchmark"):
            model.fit(train, recipe, 0, Checkpoint(Path(folder)))
    # The package freezes what it attacks; the loop runs on a copy that tracks gradients.
    frozen = build("none", {}).to(device)
    frozen.load_state_dict(model.state_dict())
    frozen.requires_grad_(requires_grad=False)
    target = Target(frozen, Adversary(Knowledge.WHITE_BOX, (0,)), "benchmark")
    return Setting(target, model.eval(), chosen.images().to(device), device)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="a few minutes instead of an hour")
    parser.add_argument("--images", type=int, help="images at once")
    parser.add_argument("--iterations", type=int, help="of both sides in the first table")
    parser.add_argument("--published", type=int, help="iterations whose score is to be reached")
    parser.add_argument("--rounds", type=int, help="turns, each with one image in the loop")
    parser.add_argument("--data", type=Path, help="folder of real datasets; else synthetic images")
    parser.add_argument("--train", type=int, help="training steps of the model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    quick = {"images": 8, "iterations": 20, "published": 300, "rounds": 3, "train": 0}
    whole = {"images": 64, "iterations": 200, "published": PUBLISHED, "rounds": 5, "train": 300}
    for name, value in (quick if options.quick else whole).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.counts = [1, 4, 16, 64] if options.quick else [1, 10, 100, 1000]
    options.growth, options.servers = (5, 4) if options.quick else (20, 8)
    if options.data is None and options.train:
        print("synthetic images have no labels to learn: the model keeps its initial weights\n")
        options.train = 0
    if min(options.images, options.iterations, options.published, options.rounds) < 1:
        sys.exit("--images, --iterations, --published and --rounds must be at least 1")
    return options


if __name__ == "__main__":
    main()
