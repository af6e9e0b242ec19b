"""Checks of a metric: what every score must obey, whatever it measures.

It is called as the benchmark calls it, in a process of its own, on generated
images that nobody has seen before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mibench import seeding
from mibench.checks.base import Finding, Verdict
from mibench.checks.process import ComponentError, Process
from mibench.data.procedural import Procedural
from mibench.metrics.fidelity import MeanSquaredError, PeakSignalToNoiseRatio, StructuralSimilarity

COUNT = 72
"""Images; more than a metric takes at once, and no multiple of that."""
SIDE = 32
FIRST_SECRET, SECRETS = 10**7, 10**9
"""Where in the stream of generated images those of the checks lie; no protocol's do."""
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

ADVICE = {
    "metric-declared": "declare unit, direction and bounds as docs/metrics.md says",
    "metric-range": "leave the check of the input to Metric.__call__; never override it",
    "metric-identity": "a perfect copy must get the best value; check the sign and more_leakage",
    "metric-direction": "set more_leakage to the direction in which more is recognised",
    "metric-monotone": "a value that improves under noise measures something else",
    "metric-batch": "score each image from its own pair alone: no mean over the batch",
    "metric-deterministic": "draw nothing at random, or from a generator with a fixed seed",
    "metric-bounds": "clamp what rounding causes, and declare the bounds of the definition",
    "metric-reference": "images lie in [0, 1]: the peak is 1, not 255, and SSIM's C1 is 0.01^2",
    "metric-input": "map images from [0, 1] to [-1, 1] before LPIPS, or pass normalize=True",
}


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


@dataclass(frozen=True)
class _Look:
    """What a check finds wrong; nothing wrong is None."""

    text: str
    verdict: Verdict = Verdict.FAILED


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


class Silent(Exception):  # noqa: N818 - an answer, no error of ours
    """A metric that gave no values; holds what it said instead."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__(next((str(v) for v in said.values() if v), "nothing"))
        self.said = said


def fresh_images(seed: int, count: int = COUNT, side: int = SIDE) -> Tensor:
    """Generated images (N, 3, S, S) in [0, 1] that follow from a seed alone."""
    source = Procedural(None, side, Path())
    return source.load("stream", FIRST_SECRET + seed % SECRETS, count).images()


def check_metric(scorer: Scorer, originals: Tensor) -> list[Finding]:
    """Runs the whole battery.

    Args:
        scorer: the metric.
        originals: see `Bench`; those of `fresh_images` with a secret seed.
    """
    bench = Bench(scorer, originals)
    if bench.facts.get("context"):
        reason = "it needs more than a pair of images (such as a judge), which this check has not"
        return [Finding(n, Verdict.SKIPPED, _TRIED[n], reason) for n in _CHECKS]
    found = []
    try:
        bench.ask(originals[:2], originals[:2])
    except Silent as silent:
        if "unavailable" in silent.said:
            return [Finding(n, Verdict.SKIPPED, _TRIED[n], str(silent)) for n in _CHECKS]
    for name, look in _CHECKS.items():
        try:
            problems = list(look(bench))
        except Silent as silent:
            # Told once, by the check of its values.
            told = Verdict.FAILED if name == "metric-bounds" else Verdict.SKIPPED
            problems = [_Look(f"it gives no values here: {silent}", told)]
        found += [
            Finding(
                name, p.verdict, _TRIED[name], p.text,
                ADVICE[name] if p.verdict in (Verdict.FAILED, Verdict.WARNED) else "",
            )
            for p in problems
        ]  # fmt: skip
        if not problems:
            found.append(Finding(name, Verdict.PASSED, _TRIED[name], "it holds"))
    return found


# --- the checks ----------------------------------------------------------------------------------


def _declared(bench: Bench) -> Iterator[_Look]:
    facts, (low, high) = bench.facts, bench.bounds
    if facts["direction"] not in ("higher", "lower"):
        yield _Look(f"more_leakage is {facts['direction']!r}, neither 'higher' nor 'lower'")
    elif facts["higher_is_better"] != (facts["direction"] == "higher"):
        yield _Look("higher_is_better contradicts more_leakage")
    if not low < high:
        yield _Look(f"the bounds [{low:g}, {high:g}] hold nothing")
    if not isinstance(facts["unit"], str):
        yield _Look(f"the unit is {facts['unit']!r}, which is no text")
    if not (isinstance(facts["chunk"], int) and facts["chunk"] > 0):
        yield _Look(f"chunk is {facts['chunk']!r}, not a number of images")


def _range(bench: Bench) -> Iterator[_Look]:
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
                yield _Look(f"it takes {what} as {where}")
                break
    if bench.scorer.score(good[:3], good)[1] is not None:
        yield _Look("it takes 3 reconstructions for 4 originals")


def _identity(bench: Bench) -> Iterator[_Look]:
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
            yield _Look(
                f"a perfect copy scores worse than {what} for {wrong} of {len(best)} images"
            )


def _direction(bench: Bench) -> Iterator[_Look]:
    near = bench.ask(bench.noisy(NOISES[0]), bench.originals).mean()
    far = bench.ask(bench.others, bench.originals).mean()
    if bench.sign * float(near - far) <= 0:
        yield _Look(
            f"declared is that {bench.facts['direction']} values show more, but near copies get "
            f"{near:.4g} and other images {far:.4g}"
        )


def _monotone(bench: Bench) -> Iterator[_Look]:
    steps = [bench.ask(bench.noisy(deviation), bench.originals) for deviation in NOISES]
    for at, (before, after) in enumerate(pairwise(steps)):
        if bench.sign * float(after.mean() - before.mean()) >= 0:
            yield _Look(
                f"it does not get worse on average when noise grows from "
                f"{NOISES[at]} to {NOISES[at + 1]}: {before.mean():.4g} and {after.mean():.4g}"
            )


def _batch(bench: Bench) -> Iterator[_Look]:
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
            yield _Look(
                f"{wrong} of {count} images score otherwise {what}, by up to {gap.max():.4g}; the "
                f"mean moves from {whole.mean():.4g} to {other.mean():.4g}"
            )


def _deterministic(bench: Bench) -> Iterator[_Look]:
    images = bench.noisy(NOISES[2])
    first, again = (bench.ask(images, bench.originals, seed) for seed in (0, 1))
    if not torch.equal(first, again):
        yield _Look(f"a second call differs by up to {(first - again).abs().max():.4g}")


def _bounds(bench: Bench) -> Iterator[_Look]:
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
            yield _Look(f"for {what} it gives no values: {Silent(said)}")
        elif not bool(values.isfinite().all()):
            yield _Look(f"for {what} it gives values that are not finite")
        elif float(values.min()) < low - 1e-9 or float(values.max()) > high + 1e-9:
            yield _Look(
                f"for {what} it gives {values.min():.6g} to {values.max():.6g}, outside its bounds "
                f"[{low:g}, {high:g}]"
            )


def _reference(bench: Bench) -> Iterator[_Look]:
    name, unit = str(bench.facts["name"]).lower(), str(bench.facts["unit"]).lower()
    images = bench.noisy(NOISES[2])
    if "psnr" in name or unit == "db":
        middle = bench.originals * (1 - FLAT)
        flat = bench.ask(middle + FLAT, middle)
        if float((flat - 20).abs().max()) > CLOSE_DB:
            yield _Look(
                f"the PSNR of images brightened by {FLAT} is {flat.mean():.4g} dB, not 20 dB"
            )
        wanted = PeakSignalToNoiseRatio().per_image(images, bench.originals)
        yield from _agrees("PSNR", bench.ask(images, bench.originals), wanted, CLOSE_DB)
    elif "ssim" in name:
        ours = StructuralSimilarity().per_image(images, bench.originals)
        yield from _agrees("SSIM", bench.ask(images, bench.originals), ours, CLOSE_SSIM)
    elif name.split("-")[0] in ("mse", "l2"):
        ours = MeanSquaredError().per_image(images, bench.originals)
        yield from _agrees("MSE", bench.ask(images, bench.originals), ours, 1e-5)
    else:
        yield _Look(f"{name} names no quantity with a reference here", Verdict.SKIPPED)


def _agrees(what: str, values: Tensor, wanted: Tensor, close: float) -> Iterator[_Look]:
    gap = (values - wanted).abs()
    if float(gap.max()) > close:
        yield _Look(
            f"it differs from an independent {what} by up to {gap.max():.4g} "
            f"(mean {values.mean():.4g} instead of {wanted.mean():.4g})"
        )


def _input(bench: Bench) -> Iterator[_Look]:
    spread = torch.rand(bench.originals[:4].shape, generator=seeding.generator(2, "metric check"))
    spread[:, :, 0, :2] = torch.tensor([0.0, 1.0])
    said, values = bench.scorer.score(spread, spread.flip(0))
    reached = said.get("reached")
    if values is None or not isinstance(reached, list):
        yield _Look("it uses no network whose input range is known here", Verdict.SKIPPED)
        return
    low, high = (float(one) for one in reached)
    if abs(low + 1) > 0.1 or abs(high - 1) > 0.1:
        yield _Look(
            f"images that span [0, 1] reach LPIPS as [{low:.3g}, {high:.3g}], not as [-1, 1]"
        )


_CHECKS: dict[str, Callable[[Bench], Iterator[_Look]]] = {
    "metric-declared": _declared,
    "metric-range": _range,
    "metric-bounds": _bounds,
    "metric-identity": _identity,
    "metric-direction": _direction,
    "metric-monotone": _monotone,
    "metric-batch": _batch,
    "metric-deterministic": _deterministic,
    "metric-reference": _reference,
    "metric-input": _input,
}
_TRIED = {
    "metric-declared": "read unit, direction and bounds",
    "metric-range": "gave it images from 0 to 255 and of wrong layouts",
    "metric-bounds": "compared its values with its bounds, on extreme images too",
    "metric-identity": "compared perfect copies with worse images",
    "metric-direction": "compared near copies with other images",
    "metric-monotone": f"added growing noise, deviations {NOISES[0]} to {NOISES[-1]}",
    "metric-batch": "scored the images together, alone, in uneven batches and in another order",
    "metric-deterministic": "scored the same images twice",
    "metric-reference": "compared it with an independent code of what its name or unit says",
    "metric-input": "recorded what reaches the first layer of a known network",
}
CHECKS = tuple(_CHECKS)
"""Names of all checks of a metric, in order."""
