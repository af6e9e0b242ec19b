"""The battery for attacks: honesty, contract, strength.

The attack runs in processes of its own against the undefended split of a small classifier. The
parent holds the secret images, computes their shares itself, and judges what comes back.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mibench.artifacts import Checkpoint
from mibench.backbones.base import BackboneSpec
from mibench.checks.base import Finding, Verdict
from mibench.checks.battery import Battery, Outcome, failed, passed, skipped, warned
from mibench.checks.confine import Limits
from mibench.checks.defense import located
from mibench.checks.process import LIMIT_CHECKS, ComponentError, Nursery, Process, kept_within
from mibench.data.procedural import CLASS_NAMES, INDEX_LIMIT, SEED_LIMIT, render
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense
from mibench.defenses.none import Undefended
from mibench.files import Json
from mibench.metrics.fidelity import PeakSignalToNoiseRatio
from mibench.protocol import Recipe
from mibench.registry import attacks
from mibench.strike import CONVERGED
from mibench.task import Classification

SIDE = 16
"""Pixels a side: generated images of 32, averaged."""
PRIVATE, AUXILIARY, VALIDATION = 12, 384, 48
"""Images of each role."""
BACKBONE: dict[str, Json] = {
    "backbone": "small-resnet",
    "backbone_params": {"stem": 8, "width": 8},
    "split_point": "stem",
    "image_shape": [3, SIDE, SIDE],
    "classes": list(CLASS_NAMES),
}
RECIPE = Recipe(steps=60, batch=32, lr=0.1, crop=0, precision="fp32")
MOST = 60
"""Most that a count which buys strength with time may be, where no parameters are given."""
MINIMUM = "linear"
"""The attack that every other one must reach on the undefended split."""
MARGIN = 1.0
"""How much it may stay below, and must be above the blind guess, in dB."""
SAME = 1e-3
"""Mean difference of pixels that is rounding."""
ALIKE = 0.02
"""Mean difference of pixels that a batch of another size or order may make."""
SECONDS = 150.0
"""That one request may take, also on a busy machine."""

PRELOAD = ("timm", "mibench.checks.attack_host")
"""What its processes need and would import one by one."""

_DECODER: dict[str, Json] = {"size": "small", "steps": MOST, "batch": 16}
_WARM: dict[str, Json] = {"steps": MOST, "tuning_images": 2, "decoder": _DECODER}
_DIFFUSION: dict[str, Json] = {
    "start": "gradient-warm",
    "gradient_warm": _WARM,
    "tuning_images": 2,
    "sampler": {"steps": 10, "inner": 5},
    "prior": {"steps": MOST // 2, "batch": 16, "channels": [16, 16, 16]},
}
SMALL: dict[str, dict[str, Json]] = {
    "decoder": _DECODER,
    "gradient": {"steps": MOST, "restarts": 1, "tuning_images": 2},
    "gradient-warm": _WARM,
    "deep-prior": {"steps": MOST, "tuning_images": 2},
    "diffusion": _DIFFUSION,
    "diffusion-mean": _DIFFUSION,
    "query-free": {"steps": 2 * MOST, "batch": 16, "decoder": _DECODER},
}
"""Parameters of the built-in attacks that fit the time of a check."""


class Scene:
    """What all attacks meet: secret images, the trained split, and the shares.

    Args:
        nursery: starts processes.
        seed: of the images; secret.
    """

    def __init__(self, nursery: Nursery, seed: int) -> None:
        self.nursery = nursery
        first = secrets.randbelow(INDEX_LIMIT - 2**16)
        count = PRIVATE + AUXILIARY + VALIDATION
        pixels, labels = render(torch.arange(first, first + count), seed=seed, size=2 * SIDE)
        small = F.avg_pool2d(pixels.float(), 2).round().to(torch.uint8)
        sizes = [PRIVATE, AUXILIARY, VALIDATION]
        self.private, self.auxiliary, self.validation = (
            ImageSet(*parts)
            for parts in zip(torch.split(small, sizes), torch.split(labels, sizes), strict=True)
        )
        self.originals = self.private.images()
        self.seed = seed

    @cached_property
    def defense(self) -> Defense:
        """The undefended split, trained for a moment."""
        spec = BackboneSpec("small-resnet", {"stem": 8, "width": 8}, "stem")
        split = spec.build((3, SIDE, SIDE), Classification(tuple(CLASS_NAMES)), 0)
        defense = Undefended(split, Undefended.Params())
        checkpoint = Checkpoint(self.nursery.folder / f"scene-{self.seed}")
        defense.fit(self.auxiliary, RECIPE, 0, checkpoint)
        return defense.eval().requires_grad_(requires_grad=False)

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Its state."""
        return {name: one.clone() for name, one in self.defense.state_dict().items()}

    @cached_property
    def share(self) -> Tensor:
        """What the server receives of the private images."""
        with torch.no_grad():
            return self.defense.protect(self.originals)[0]

    def known(self, private: bool) -> dict[str, Tensor]:
        """The images that a preparation is handed, with the private ones as bait."""
        sent: dict[str, Tensor] = {}
        for name in ("auxiliary", "validation"):
            images: ImageSet = getattr(self, name)
            sent |= {name: images.raw(), f"{name}.labels": images.labels}
        return sent | ({"private": self.private.raw()} if private else {})

    @cached_property
    def floor(self) -> float:
        """PSNR in dB of the mean auxiliary image."""
        mean = self.auxiliary.images().mean(0, keepdim=True)
        return self.psnr(mean.expand_as(self.originals))

    def psnr(self, images: Tensor) -> float:
        """Mean PSNR in dB."""
        return float(PeakSignalToNoiseRatio()(images.clamp(0, 1), self.originals).mean())


class Run:
    """One attack in one process.

    Args:
        scene: what it meets.
        name: of the attack, with an absolute path.
        params: its parameters.
        most: see `mibench.checks.attack_host.open_attack`.
        limits: of the process.
        readable: folders that it may read.
        bait: whether originals lie in memory while it prepares.
        doubled: whether its budget is doubled.
    """

    def __init__(
        self,
        scene: Scene,
        name: str,
        params: Mapping[str, Json],
        most: int | None,
        limits: Limits,
        readable: Sequence[Any],
        *,
        bait: bool = False,
        doubled: bool = False,
    ) -> None:
        self.scene = scene
        self.process: Process = scene.nursery.start("attack", limits, readable)
        self.process.ask("attack.watch")
        self.loaded, _ = self.process.ask(
            "component.load", kind="attack", name=name, params=dict(params)
        )
        self.opened, _ = self.process.ask(
            "attack.open",
            scene.weights,
            most=most,
            doubled=doubled,
            knowledge=None,
            seed=scene.seed,
            split=BACKBONE,
        )
        self.said, _ = self.process.ask(
            "attack.prepare", scene.known(bait), seconds=SECONDS, seed=scene.seed
        )
        self.seen = list(self.said["seen"])
        self.denied = str(self.said["denied"])

    def rebuild(
        self, share: Tensor, *, bait: bool = False, seed: int = 0
    ) -> tuple[Mapping[str, Any], Tensor | None]:
        """Rebuilds images from a share; returns what was said and what came back, if a tensor."""
        sent = {"share.0": share}
        if bait:
            sent["private"] = self.scene.private.raw()
        said, found = self.process.ask(
            "attack.reconstruct", sent, seconds=SECONDS, seed=self.scene.seed + seed
        )
        self.seen += [one for one in said["seen"] if one not in self.seen]
        self.denied = self.denied or str(said["denied"])
        return said, found.get("images")


class Trial:
    """An attack on trial: everything is computed when it is first asked for, and kept.

    Args:
        nursery: starts the processes.
        name: of the attack.
        params: its parameters; None for those that fit the time of a check.
        limits: of its processes.
    """

    def __init__(
        self, nursery: Nursery, name: str, params: Mapping[str, Json] | None, limits: Limits
    ) -> None:
        self.scene = Scene(nursery, secrets.randbelow(SEED_LIMIT // 2))
        self.name, self.readable = located(name)
        self.limits = limits
        built_in = name in attacks and attacks.entry(name).origin == "mibench"
        self.params = SMALL.get(name, {}) if params is None and built_in else params or {}
        self.most = MOST if params is None and not built_in else None
        self.runs: list[Run] = []

    def run(self, **how: bool) -> Run:
        """Starts the attack in a new process and prepares it."""
        found = Run(
            self.scene, self.name, self.params, self.most, self.limits, self.readable, **how
        )
        self.runs.append(found)
        return found

    @cached_property
    def alone(self) -> Run:
        """The attack where no original is."""
        return self.run()

    @cached_property
    def baited(self) -> Run:
        """The attack prepared where originals lie in memory."""
        return self.run(bait=True)

    @cached_property
    def first(self) -> tuple[Mapping[str, Any], Tensor | None]:
        """What the attack alone makes of the shares; nothing where its preparation was refused."""
        if self.alone.denied:
            return {"type": "nothing"}, None
        return self.alone.rebuild(self.scene.share)

    @property
    def images(self) -> Tensor:
        """The same, where it is images.

        Raises:
            Useless: it is not.
        """
        _, images = self.first
        wanted = self.scene.originals.shape
        if images is None or images.shape != wanted or not bool(images.isfinite().all()):
            raise Useless
        return images.float()

    @cached_property
    def random(self) -> bool:
        """Whether the images follow from random draws."""
        _, again = self.alone.rebuild(self.scene.share, seed=1)
        return again is None or _gap(again, self.images) > SAME

    @cached_property
    def minimum(self) -> float:
        """PSNR in dB of the attack that every other must reach."""
        run = Run(self.scene, MINIMUM, {}, None, Limits(), ())
        _, images = run.rebuild(self.scene.share)
        run.process.close()
        assert images is not None
        return self.scene.psnr(images)


class Useless(Exception):  # noqa: N818 - told by another check
    """The attack gives no images of the right shape, which `attack-output` tells."""


battery: Battery[Trial] = Battery()
"""All checks of an attack."""


def check_attack(
    nursery: Nursery,
    name: str,
    params: Mapping[str, Json] | None = None,
    *,
    only: Sequence[str] | None = None,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Finding]:
    """Tries everything that an attack could get wrong or cheat with.

    Args:
        nursery: starts the processes; the attack is never imported here, unless it comes with
            mibench.
        name: registered name, ``package.module:Class`` or ``./file.py:Class``.
        params: its parameters; without any, counts that buy strength are cut to `MOST`.
        only: names of the checks to run; all of them if None.
        limits: of its processes.
        progress: told what is being done.

    Returns:
        One finding for each check, in order.

    Raises:
        MibenchError: there is no such attack, or a parameter is wrong.
    """
    trial = Trial(nursery, name, params, limits or Limits(seconds=SECONDS))
    found: list[Finding] = []
    try:
        for check in battery.checks.values():
            if only is not None and check.name not in only and not set(only) & set(LIMIT_CHECKS):
                continue
            progress(check.name)
            try:
                found.append(check.finding(trial))
            except Useless:
                words = "it gives no images to look at, see attack-output"
                found.append(Finding(check.name, Verdict.SKIPPED, check.tried, words))
            except ComponentError as error:
                found.append(error.finding)
                if error.finding.check != "raises":
                    break
    finally:
        for run in trial.runs:
            found += run.process.findings
            run.process.close()
    return list(dict.fromkeys([*found, *kept_within(found, only)]))


def _gap(images: Tensor, others: Tensor) -> float:
    return float((images.float() - others.float()).abs().mean())


# --- contract ------------------------------------------------------------------------------------


@battery.check(
    "attack-output",
    tried="rebuilt secret images from their shares",
    advice="return a float tensor (B, 3, H, W) in [0, 1], one image per share",
)
def _output(trial: Trial) -> Outcome:
    said, images = trial.first
    wanted = tuple(trial.scene.originals.shape)
    if trial.alone.denied:
        return skipped("the target refused what it asked for, see attack-knowledge")
    if images is None:
        return failed(f"it returned {said['type']}, not a tensor")
    if tuple(images.shape) != wanted:
        return failed(f"it returned images of shape {tuple(images.shape)}, not {wanted}")
    if not images.is_floating_point() or not bool(images.isfinite().all()):
        return failed("it returned values that are not finite floats")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        return failed(f"it returned values from {low:.4g} to {high:.4g}, outside [0, 1]")
    return passed(f"images of shape {wanted} with values from {low:.3g} to {high:.3g}")


@battery.check(
    "attack-knowledge",
    tried="ran it with the knowledge that it declares and nothing more",
    advice="declare the knowledge that it needs, and use the target's methods alone",
)
def _knowledge(trial: Trial) -> Outcome:
    assert trial.first
    run = trial.alone
    knowledge = run.opened["knowledge"]
    if run.denied:
        return failed(f"it declares {knowledge}: {run.denied}")
    past = sorted({what for kind, what in run.seen if kind == "model"})
    if past and knowledge != "white_box":
        some = ", ".join(past[:4])
        return failed(f"it declares {knowledge} and reached past the target, to {some}")
    return passed(f"it declares {knowledge} and used no more")


@battery.check(
    "attack-queries",
    tried="counted the images that it sends through the client",
    advice="leave Target.queries alone",
)
def _queries(trial: Trial) -> Outcome:
    assert trial.first
    said, _ = trial.alone.process.ask("attack.target")
    if said["queries"] != said["counted"]:
        return failed(f"it sent {said['counted']} images, and {said['queries']} are counted")
    return passed(f"{said['counted']} queries")


@battery.check(
    "attack-target",
    tried="compared the target before and after",
    advice="copy what you train or change; the target serves others after you",
)
def _target(trial: Trial) -> Outcome:
    assert trial.first
    said, after = trial.alone.process.ask("attack.target")
    before = trial.scene.weights
    changed = [name for name, one in before.items() if not torch.equal(one, after.get(name, -one))]
    if changed or set(after) != set(before):
        return failed(f"it changed {len(changed)} of the target's tensors, such as {changed[:1]}")
    if said["training"] or said["learns"]:
        return failed("it left the target in training mode, or its weights open to training")
    return passed("every weight and mode is as before")


@battery.check(
    "attack-shares",
    tried="gave it the shares of the same images in another order",
    advice="rebuild each image from its own share",
)
def _shares(trial: Trial) -> Outcome:
    shift = 5
    _, moved = trial.alone.rebuild(trial.scene.share.roll(shift, 0))
    if moved is None or moved.shape != trial.images.shape:
        raise Useless
    images = trial.images
    if float(images.std(0).mean()) < SAME:
        return failed("it rebuilds the same image from every share")
    own = (moved.roll(-shift, 0) - images).square().mean()
    stayed = (moved - images).square().mean()
    if float(own) > 0.5 * float(stayed):
        return failed(
            f"its images do not move with the shares: squared difference {own:.3g} to those of the "
            f"same shares, {stayed:.3g} to those of the same places"
        )
    return passed(f"its images move with the shares ({own:.2g} against {stayed:.2g})")


@battery.check(
    "attack-batch",
    tried="rebuilt images one by one and in another order",
    advice="let no image of a batch depend on another one, or say why in the docstring",
)
def _batch(trial: Trial) -> Outcome:
    if trial.random:
        return skipped("it draws at random for each batch, so batches cannot be compared")
    share, images = trial.scene.share, trial.images
    some = (0, 4, 7)
    alone = [trial.alone.rebuild(share[at : at + 1])[1] for at in some]
    order = torch.arange(len(share)).flip(0)
    _, turned = trial.alone.rebuild(share[order])
    if turned is None or any(one is None or one.shape != images[:1].shape for one in alone):
        return failed("it gives no image for a single share")
    gaps = [
        _gap(one, images[at : at + 1])
        for at, one in zip(some, alone, strict=True)
        if one is not None
    ]
    gap, other = max(gaps), _gap(turned[order], images)
    if max(gap, other) > ALIKE:
        return failed(
            f"pixels differ by {gap:.3g} on average when it sees one share alone, and by "
            f"{other:.3g} in another order"
        )
    return passed(f"the same images alone (within {gap:.2g}) and in another order ({other:.2g})")


# --- honesty -------------------------------------------------------------------------------------


@battery.check(
    "attack-private",
    tried="prepared it where private images lie in memory, and watched what it reads",
    advice="learn from the auxiliary images that prepare() is handed, and from nothing else",
)
def _private(trial: Trial) -> Outcome:
    images = trial.images
    _, again = trial.baited.rebuild(trial.scene.share)
    read = [(kind, what) for run in (trial.alone, trial.baited) for kind, what in run.seen]
    sources = sorted({what for kind, what in read if kind in ("dataset", "file")})
    if sources:
        return failed(f"it reads images by itself: {', '.join(sources[:4])}")
    if any(kind == "bait" for kind, _ in read):
        return failed("it reads private images that it was not handed")
    if again is None or again.shape != images.shape or _gap(again, images) > SAME:
        gap = float("nan") if again is None else _gap(again, images)
        return failed(
            f"its images change by {gap:.3g} on average when private images lie in memory while it "
            "prepares, with the same seeds"
        )
    return passed("it reads nothing of them, and prepares the same with and without them")


@battery.check(
    "attack-truth",
    tried="rebuilt images where the originals lie in memory, and where they do not",
    advice="choose among iterates and restarts by a loss that the attacker can compute",
)
def _truth(trial: Trial) -> Outcome:
    images = trial.images
    before = len([one for one in trial.baited.seen if one[0] == "bait"])
    _, again = trial.baited.rebuild(trial.scene.share, bait=True)
    if len([one for one in trial.baited.seen if one[0] == "bait"]) > before:
        return failed("it reads the originals while it reconstructs")
    if again is None or again.shape != images.shape or _gap(again, images) > SAME:
        gap = float("nan") if again is None else _gap(again, images)
        better = trial.scene.psnr(again) - trial.scene.psnr(images) if again is not None else 0.0
        return failed(
            f"its images change by {gap:.3g} on average when the originals lie in memory, and come "
            f"{better:+.2f} dB nearer"
        )
    return passed("the same images with and without the originals in memory")


# --- strength ------------------------------------------------------------------------------------


@battery.check(
    "attack-floor",
    tried="compared it with a blind guess on the undefended split",
    advice="an attack that does not beat the mean image has learned nothing from the shares",
)
def _floor(trial: Trial) -> Outcome:
    reached, floor = trial.scene.psnr(trial.images), trial.scene.floor
    words = f"{reached:.2f} dB, and a blind guess gets {floor:.2f} dB"
    if reached > floor + MARGIN:
        return passed(words)
    if trial.alone.opened["knowledge"] == "data_only":
        return warned(f"{words}; with data alone that can be honest at the budget of a check")
    return failed(words)


@battery.check(
    "attack-calibrated",
    tried=f"compared it with the {MINIMUM} attack on the undefended split",
    advice="raise its budget; a weak attack makes every defense look good",
)
def _calibrated(trial: Trial) -> Outcome:
    reached, wanted = trial.scene.psnr(trial.images), trial.minimum
    words = f"{reached:.2f} dB, and the {MINIMUM} attack reaches {wanted:.2f} dB"
    if reached >= wanted - MARGIN:
        return passed(words)
    return warned(f"{words}: not calibrated at the budget of this check")


@battery.check(
    "attack-converged",
    tried="doubled what buys it strength with time",
    advice="raise its budget until twice as much changes little",
)
def _converged(trial: Trial) -> Outcome:
    images, budget = trial.images, trial.alone.opened["budget"]
    if not budget:
        return skipped("it names no budget; override budget() if it has steps or restarts")
    _, more = trial.run(doubled=True).rebuild(trial.scene.share)
    if more is None or more.shape != images.shape:
        return warned("with twice the budget it gives no images")
    gained = trial.scene.psnr(more) - trial.scene.psnr(images)
    told = ", ".join(f"{key} {value}" for key, value in budget.items())
    words = f"twice the budget ({told}) changes {gained:+.2f} dB"
    if abs(gained) > CONVERGED["psnr"]:
        return warned(f"{words}: not converged at the budget of this check")
    return passed(words)
