"""Checks of a metric: what every score must obey, whatever it measures.

It is called as the benchmark calls it, in a process of its own, on generated
images that nobody has seen before.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from mibench import seeding
from mibench.checks.base import Finding, Verdict
from mibench.checks.battery import Battery, Outcome, failed, passed, skipped
from mibench.checks.confine import Limits
from mibench.checks.defense import located
from mibench.checks.process import ComponentError, Nursery, Process, kept_within
from mibench.data.procedural import SEED_LIMIT, render
from mibench.errors import InvalidParamsError
from mibench.files import Json
from mibench.metrics.fidelity import MeanSquaredError, PeakSignalToNoiseRatio, StructuralSimilarity

PRELOAD = ("torchvision", "mibench.checks.metric_host")
"""What its process needs and would import itself."""
COUNT = 72
"""Images; more than a metric takes at once, and no multiple of that."""
SIDE = 32
NOISES = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Deviations of the growing noise."""
SAME = 1e-4
"""Difference between two values of one pair that is rounding: relative, or absolute below 1."""
FLAT = 0.1
"""Brightness that is added for the PSNR of exactly 20 dB."""
CLOSE_DB = 0.05
"""Difference in dB that two codes of the PSNR may show."""
CLOSE_SSIM = 0.15
"""Difference that two variants of SSIM may show: padding the border alone changes 0.1."""


class Scorer:
    """A metric in a process of its own.

    Args:
        process: confined, without a component.
        name: of the metric, or ``file.py:Class``.

    Raises:
        ComponentError: the metric cannot be made.
        MibenchError: there is no such metric.
    """

    def __init__(self, process: Process, name: str) -> None:
        self._process = process
        process.ask("metric.prepare")
        known, _ = process.ask("component.load", kind="metric", name=name)
        declared, _ = process.ask("metric.open")
        self.facts: Mapping[str, Any] = {**known, **declared}

    def score(
        self, reconstructions: Tensor, originals: Tensor, seed: int = 0
    ) -> tuple[Mapping[str, Any], Tensor | None]:
        """What `mibench.checks.metric_host.score` answers, and the values if there are any.

        Raises:
            ComponentError: the metric has broken a limit.
        """
        images = {"reconstructions": reconstructions, "originals": originals}
        try:
            said, found = self._process.ask("metric.score", images, seed=seed)
        except ComponentError as error:
            if error.finding.check != "raises":
                raise
            return {"raised": error.finding.found}, None
        return said, found.get("values")


class Bench:
    """Images, and the metric under test.

    Args:
        scorer: the metric.
        originals: (N, 3, H, W) in [0, 1], all different.
    """

    def __init__(self, scorer: Scorer, originals: Tensor) -> None:
        self.scorer = scorer
        self.originals = originals
        self.facts = scorer.facts
        draws = seeding.generator(0, "metric check")
        self.noise = torch.randn(originals.shape, generator=draws)
        self.others = originals.roll(1, 0)
        self.sign = -1.0 if self.facts["direction"] == "lower" else 1.0

    @property
    def bounds(self) -> tuple[float, float]:
        """Declared, possibly infinite."""
        low, high = (float(one) for one in self.facts["bounds"])
        return low, high

    def out_of_reach(self) -> str | None:
        """Why the metric cannot be tried here at all, if so."""
        if self.facts.get("context"):
            return "it needs more than a pair of images, such as a judge, and there is none here"
        said, _ = self.scorer.score(self.originals[:2], self.originals[:2])
        return str(said["unavailable"]) if "unavailable" in said else None

    def noisy(self, deviation: float) -> Tensor:
        """The originals under noise."""
        return (self.originals + deviation * self.noise).clamp(0, 1)

    def ask(self, reconstructions: Tensor, originals: Tensor, seed: int = 0) -> Tensor:
        """The values (N,) float64.

        Raises:
            Silent: the metric has refused good images, or returned no values.
        """
        said, values = self.scorer.score(reconstructions, originals, seed)
        if values is None:
            raise Silent(said)
        return values.double()


battery: Battery[Bench] = Battery()
"""All checks of a metric."""


class Silent(Exception):  # noqa: N818 - an answer, no error of ours
    """A metric that gave no values; holds what it said instead."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__(next((str(v) for v in said.values() if v), "nothing"))
        self.said = said


def fresh_images(seed: int, count: int = COUNT, side: int = SIDE) -> Tensor:
    """Generated images (N, 3, S, S) in [0, 1] that follow from a seed alone."""
    return render(torch.arange(count), seed, side)[0].float() / 255


def check_metric(
    nursery: Nursery,
    name: str,
    params: Mapping[str, Json] | None = None,
    *,
    only: Sequence[str] | None = None,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Finding]:
    """Tries everything that a metric could get wrong.

    Args:
        nursery: starts the process; the metric is never imported here.
        name: registered name, ``package.module:Class`` or ``./file.py:Class``.
        params: must be empty: a metric has no parameters, or its values would not compare.
        only: names of the checks to run; all of them if None.
        limits: of its process.
        progress: told what is being done.

    Returns:
        One finding for each check, in order.

    Raises:
        MibenchError: there is no such metric, or there are parameters.
    """
    if params:
        raise InvalidParamsError(f"a metric has no parameters; leave out {', '.join(params)}")
    where, readable = located(name)
    process = nursery.start("metric", limits, readable)
    chosen = [one for one in battery.checks.values() if only is None or one.name in only]
    found: list[Finding] = []
    try:
        scorer = Scorer(process, where)
        bench = Bench(scorer, fresh_images(secrets.randbelow(SEED_LIMIT)))
        reason = bench.out_of_reach()
        for check in chosen:
            progress(check.name)
            if reason is not None:
                found.append(Finding(check.name, Verdict.SKIPPED, check.tried, reason))
            else:
                found.append(check.finding(bench))
    except ComponentError as error:
        found.append(error.finding)
    finally:
        found += process.findings
        process.close()
    return [*found, *kept_within(found, only)]


def gathered(look: Callable[[Bench], Iterator[str | Outcome]]) -> Callable[[Bench], Outcome]:
    """Makes one outcome of all that a check finds wrong; an outcome that it yields stands."""

    def run(bench: Bench) -> Outcome:
        problems: list[str] = []
        try:
            for one in look(bench):
                if not isinstance(one, str):
                    return one
                problems.append(one)
        except Silent as silent:
            problems.append(f"it gives no values: {silent}")
        return failed("; ".join(problems)) if problems else passed("it holds")

    return run


# --- the checks ----------------------------------------------------------------------------------


@battery.check(
    "metric-declared",
    tried="read unit, direction and bounds",
    advice="declare unit, direction and bounds as docs/metrics.md says",
)
@gathered
def _declared(bench: Bench) -> Iterator[str | Outcome]:
    facts, (low, high) = bench.facts, bench.bounds
    if facts["direction"] not in ("higher", "lower"):
        yield (f"more_leakage is {facts['direction']!r}, neither 'higher' nor 'lower'")
    elif facts["higher_is_better"] != (facts["direction"] == "higher"):
        yield ("higher_is_better contradicts more_leakage")
    if not low < high:
        yield (f"the bounds [{low:g}, {high:g}] hold nothing")
    if not isinstance(facts["unit"], str):
        yield (f"the unit is {facts['unit']!r}, which is no text")
    if not (isinstance(facts["chunk"], int) and facts["chunk"] > 0):
        yield (f"chunk is {facts['chunk']!r}, not a number of images")


@battery.check(
    "metric-range",
    tried="gave it images from 0 to 255 and of wrong layouts",
    advice="leave the check of the input to Metric.__call__; never override it",
)
@gathered
def _range(bench: Bench) -> Iterator[str | Outcome]:
    good = bench.originals[:4]
    holes = good.clone()
    holes[1, 0, 3, 3] = math.nan
    bad = {
        "values from 0 to 255": good * 255,
        "bytes": (good * 255).round().to(torch.uint8),
        "values from -1 to 1": good * 2 - 1,
        "values that are not a number": holes,
        "one channel": good[:, :1],
        "no batch axis": good[0],
        "no image": good[:0],
    }
    for what, images in bad.items():
        fits = images.shape == good.shape
        pairs = [("both", images, images)]
        if fits:
            pairs += [("reconstructions", images, good), ("originals", good, images)]
        for where, one, other in pairs:
            if bench.scorer.score(one, other)[1] is not None:
                yield (f"it takes {what} as {where}")
                break
    if bench.scorer.score(good[:3], good)[1] is not None:
        yield ("it takes 3 reconstructions for 4 originals")


@battery.check(
    "metric-identity",
    tried="compared perfect copies with worse images",
    advice="a perfect copy must get the best value; check the sign and more_leakage",
)
@gathered
def _identity(bench: Bench) -> Iterator[str | Outcome]:
    best = bench.ask(bench.originals, bench.originals)
    for what, images in (
        ("a slightly noisy one", bench.noisy(NOISES[1])),
        ("another image", bench.others),
        ("a brighter one", bench.originals * 0.9 + 0.1),
        ("a grey one", torch.full_like(bench.originals, 0.5)),
    ):
        better = bench.sign * (bench.ask(images, bench.originals) - best)
        wrong = int((better > SAME * best.abs().clamp_min(1)).sum())
        if wrong:
            yield (f"a perfect copy scores worse than {what} for {wrong} of {len(best)} images")


@battery.check(
    "metric-direction",
    tried="compared near copies with other images",
    advice="set more_leakage to the direction in which more is recognised",
)
@gathered
def _direction(bench: Bench) -> Iterator[str | Outcome]:
    near = bench.ask(bench.noisy(NOISES[0]), bench.originals).mean()
    far = bench.ask(bench.others, bench.originals).mean()
    if bench.sign * float(near - far) <= 0:
        yield (
            f"declared is that {bench.facts['direction']} values show more, but near copies get "
            f"{near:.4g} and other images {far:.4g}"
        )


@battery.check(
    "metric-monotone",
    tried=f"added growing noise, deviations {NOISES[0]} to {NOISES[-1]}",
    advice="a value that improves under noise measures something else",
)
@gathered
def _monotone(bench: Bench) -> Iterator[str | Outcome]:
    steps = [bench.ask(bench.noisy(deviation), bench.originals) for deviation in NOISES]
    for at, (before, after) in enumerate(pairwise(steps)):
        if bench.sign * float(after.mean() - before.mean()) >= 0:
            yield (
                f"it does not get worse on average when noise grows from "
                f"{NOISES[at]} to {NOISES[at + 1]}: {before.mean():.4g} and {after.mean():.4g}"
            )


@battery.check(
    "metric-batch",
    tried="scored the images together, alone, in uneven batches and in another order",
    advice="score each image from its own pair alone: no mean over the batch",
)
@gathered
def _batch(bench: Bench) -> Iterator[str | Outcome]:
    images, originals = bench.noisy(NOISES[2]), bench.originals
    # Some are good and some are bad, so that a mean over them shows.
    images = torch.where(torch.arange(len(images)).view(-1, 1, 1, 1) % 3 == 0, bench.others, images)
    whole = bench.ask(images, originals)
    count = len(images)
    order = torch.randperm(count, generator=seeding.generator(1, "metric check"))
    alone = torch.cat([bench.ask(images[i : i + 1], originals[i : i + 1]) for i in range(count)])
    uneven = torch.cat(
        [bench.ask(images[i : i + 7], originals[i : i + 7]) for i in range(0, count, 7)]
    )
    mixed = torch.empty_like(whole)
    mixed[order] = bench.ask(images[order], originals[order])
    for what, other in (
        ("alone", alone), ("in batches of 7", uneven), ("in another order", mixed),
    ):  # fmt: skip
        gap = (other - whole).abs()
        wrong = int((gap > SAME * whole.abs().clamp_min(1)).sum())
        if wrong:
            yield (
                f"{wrong} of {count} images score otherwise {what}, by up to {gap.max():.4g}; the "
                f"mean moves from {whole.mean():.4g} to {other.mean():.4g}"
            )


@battery.check(
    "metric-deterministic",
    tried="scored the same images twice",
    advice="draw nothing at random, or from a generator with a fixed seed",
)
@gathered
def _deterministic(bench: Bench) -> Iterator[str | Outcome]:
    images = bench.noisy(NOISES[2])
    first, again = (bench.ask(images, bench.originals, seed) for seed in (0, 1))
    if not torch.equal(first, again):
        yield (f"a second call differs by up to {(first - again).abs().max():.4g}")


@battery.check(
    "metric-bounds",
    tried="compared its values with its bounds, on extreme images too",
    advice="clamp what rounding causes, and declare the bounds of the definition",
)
@gathered
def _bounds(bench: Bench) -> Iterator[str | Outcome]:
    low, high = bench.bounds
    shape = bench.originals[:4]
    cases = {
        "noisy images": (bench.noisy(NOISES[3]), bench.originals),
        "perfect copies": (bench.originals, bench.originals),
        "black on white": (torch.zeros_like(shape), torch.ones_like(shape)),
        "two grey images": (torch.full_like(shape, 0.5), torch.full_like(shape, 0.5)),
        "negatives": (1 - bench.originals, bench.originals),
    }
    for what, (images, originals) in cases.items():
        said, values = bench.scorer.score(images, originals)
        if values is None:
            yield (f"for {what} it gives no values: {Silent(said)}")
        elif not bool(values.isfinite().all()):
            yield (f"for {what} it gives values that are not finite")
        elif float(values.min()) < low - 1e-9 or float(values.max()) > high + 1e-9:
            yield (
                f"for {what} it gives {values.min():.6g} to {values.max():.6g}, outside its bounds "
                f"[{low:g}, {high:g}]"
            )


@battery.check(
    "metric-reference",
    tried="compared it with an independent code of what its name or unit says",
    advice="images lie in [0, 1]: the peak is 1, not 255, and SSIM's C1 is 0.01^2",
)
@gathered
def _reference(bench: Bench) -> Iterator[str | Outcome]:
    name, unit = str(bench.facts["name"]).lower(), str(bench.facts["unit"]).lower()
    images = bench.noisy(NOISES[2])
    if "psnr" in name or unit == "db":
        middle = bench.originals * (1 - FLAT)
        flat = bench.ask(middle + FLAT, middle)
        if float((flat - 20).abs().max()) > CLOSE_DB:
            yield (f"the PSNR of images brightened by {FLAT} is {flat.mean():.4g} dB, not 20 dB")
        wanted = PeakSignalToNoiseRatio().per_image(images, bench.originals)
        yield from _agrees("PSNR", bench.ask(images, bench.originals), wanted, CLOSE_DB)
    elif "ssim" in name:
        ours = StructuralSimilarity().per_image(images, bench.originals)
        yield from _agrees("SSIM", bench.ask(images, bench.originals), ours, CLOSE_SSIM)
    elif name.split("-")[0] in ("mse", "l2"):
        ours = MeanSquaredError().per_image(images, bench.originals)
        yield from _agrees("MSE", bench.ask(images, bench.originals), ours, 1e-5)
    else:
        yield skipped(f"{name} names no quantity with a reference here")


def _agrees(what: str, values: Tensor, wanted: Tensor, close: float) -> Iterator[str]:
    gap = (values - wanted).abs()
    if float(gap.max()) > close:
        yield (
            f"it differs from an independent {what} by up to {gap.max():.4g} "
            f"(mean {values.mean():.4g} instead of {wanted.mean():.4g})"
        )


@battery.check(
    "metric-input",
    tried="recorded what reaches the first layer of a known network",
    advice="map images from [0, 1] to [-1, 1] before LPIPS, or pass normalize=True",
)
@gathered
def _input(bench: Bench) -> Iterator[str | Outcome]:
    spread = torch.rand(bench.originals[:4].shape, generator=seeding.generator(2, "metric check"))
    spread[:, :, 0, :2] = torch.tensor([0.0, 1.0])
    said, values = bench.scorer.score(spread, spread.flip(0))
    reached = said.get("reached")
    if values is None or not isinstance(reached, list):
        yield skipped("it uses no network whose input range is known here")
        return
    low, high = (float(one) for one in reached)
    if abs(low + 1) > 0.1 or abs(high - 1) > 0.1:
        yield (f"images that span [0, 1] reach LPIPS as [{low:.3g}, {high:.3g}], not as [-1, 1]")
