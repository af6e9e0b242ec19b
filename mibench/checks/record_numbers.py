"""Checks of a record's numbers: all that follows from per-image values and stored images."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mibench import seeding
from mibench.checks.base import Verdict
from mibench.checks.record_run import Problem, Run
from mibench.data.roles import open_dataset, private_images
from mibench.errors import MibenchError, UnavailableError
from mibench.gallery import FIRST_CHOICE
from mibench.metrics.base import Metric
from mibench.metrics.intervals import Estimate, estimate_mean, normalised_leakage
from mibench.protocol import DataRule, is_folder
from mibench.record import CONTROLLED, PLACES, Score
from mibench.registry import datasets, metrics
from mibench.scoring import credit, spread

SAME = 1e-6
"""Relative difference that other machines may make in a mean."""
PEAK_PSNR = 60.0
"""Cap of the built-in PSNR in dB."""
ROUNDED = 0.5 / 255
"""Most that a pixel of a stored image differs from the one that was scored."""
LOOSE = 0.02
"""Most that SSIM or LPIPS of a stored image may differ from the value in the table."""
PIXEL_METRICS = ("mse", "psnr", "ssim", "lpips")
"""Metrics that need nothing but a pair of images."""


def _differ(a: float | None, b: float | None) -> bool:
    if a is None or b is None:
        return a is not b
    return not math.isclose(a, b, rel_tol=SAME, abs_tol=1e-9)


def _seed(run: Run) -> int:
    # As `strike.interval_seed` makes it from the job.
    return seeding.derive(run.record.seed, "intervals")


def _direction(score: Score) -> Literal["higher", "lower"]:
    return "higher" if score.higher_is_better else "lower"


# --- means and leakage ---------------------------------------------------------------------------


def means(run: Run) -> Iterator[Problem]:
    """Everything that sums up a column."""
    for place, score in run.placed_scores():
        yield from _summary(run, place, PLACES[place], score)
    for part in run.record.suite:
        for score in part.scores:
            yield from _summary(run, f"part {part.attack}", f"{part.attack}_", score)


def _summary(run: Run, place: str, prefix: str, score: Score) -> Iterator[Problem]:
    name = f"{prefix}{score.metric}"
    values = run.values(name)
    if score.value is None:
        if values is not None:
            yield Problem(f"{place} has no {score.metric}, but the table has the column {name!r}")
        return
    if values is None:
        yield Problem(f"the table has no column {name!r} of finite numbers for {place}")
        return
    computed = estimate_mean(values, _seed(run))
    yield from _against(f"{place}: {score.metric}", score, computed)
    if run.record.format_version >= CONTROLLED:
        for key, wanted in spread(values, _direction(score)).items():
            if _differ(getattr(score, key), wanted):
                yield Problem(
                    f"{place}: {key} of {score.metric} is {_told(getattr(score, key))}, but the "
                    f"per-image values give {wanted:.6g}"
                )


def _against(what: str, score: Score, computed: Estimate) -> Iterator[Problem]:
    for said, is_there, wanted in (
        ("mean", score.value, computed.value),
        ("lower end", score.ci_low, computed.low),
        ("upper end", score.ci_high, computed.high),
    ):
        if _differ(is_there, wanted):
            yield Problem(
                f"the {said} of {what} is {_told(is_there)}, but the per-image values give "
                f"{_told(wanted)}"
            )


def _told(value: float | None) -> str:
    return "missing" if value is None else f"{value:.6g}"


def leakage(run: Run) -> Iterator[Problem]:
    """The normalised leakage of every metric."""
    for score, given in zip(run.record.scores, run.record.leakage, strict=False):
        columns = [
            run.values(f"{prefix}{score.metric}") for prefix in ("", "prior_only_", "undefended_")
        ]
        values, floor, reference = columns
        if values is None or floor is None or reference is None:
            if given.value is not None:
                yield Problem(
                    f"{given.metric} has a value, and the table lacks what it follows from"
                )
            continue
        computed = normalised_leakage(
            values, floor, reference, more_leakage=_direction(score), seed=_seed(run)
        )
        yield from _against(given.metric, given, computed)


# --- identities ----------------------------------------------------------------------------------


def identities(run: Run) -> Iterator[Problem]:
    """What the metrics' definitions imply, image by image."""
    for place, prefix in PLACES.items():
        scores = {score.metric: score for score in getattr(run.record, place)}
        for score in scores.values():
            yield from _definition(place, score)
            values = run.values(f"{prefix}{score.metric}")
            if values is not None:
                yield from _bounded(place, score.metric, values)
        mse, psnr = run.values(f"{prefix}mse"), run.values(f"{prefix}psnr")
        if mse is None or psnr is None or not {"mse", "psnr"} <= set(scores):
            continue
        if scores["mse"].source == scores["psnr"].source:  # a floor may be another guess for each
            yield from _psnr_of_mse(place, mse, psnr)
    yield from _accuracy(run)


def _definition(place: str, score: Score) -> Iterator[Problem]:
    if not _built_in(score.metric):
        yield Problem(
            f"{place}: {score.metric} is no metric of this mibench, so its bounds are not checked",
            Verdict.WARNED,
        )
        return
    known: type[Metric] = metrics.load(score.metric)
    for what, said, right in (
        ("version", score.version, known.version),
        ("unit", score.unit, known.unit),
        ("direction", _direction(score), known.more_leakage),
    ):
        if said != right:
            verdict = Verdict.WARNED if what == "version" else Verdict.FAILED
            yield Problem(f"{place}: {score.metric} has {what} {said!r}, not {right!r}", verdict)


def _bounded(place: str, name: str, values: Tensor) -> Iterator[Problem]:
    if not _built_in(name):
        return
    low, high = metrics.load(name).bounds
    outside = (values < low - 1e-9) | (values > high + 1e-9)
    if bool(outside.any()):
        first = int(outside.nonzero()[0])
        yield Problem(
            f"{place}: {name} of {int(outside.sum())} images lies outside [{low:g}, {high:g}], "
            f"such as {values[first]:.6g} of image {first}"
        )


def _psnr_of_mse(place: str, mse: Tensor, psnr: Tensor) -> Iterator[Problem]:
    wanted = -10 * mse.clamp(min=10 ** (-PEAK_PSNR / 10)).log10()
    wrong = (psnr - wanted).abs() > 1e-6
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        yield Problem(
            f"{place}: the PSNR of {int(wrong.sum())} images is not that of their MSE, such as "
            f"{psnr[first]:.4f} dB instead of {wanted[first]:.4f} dB of image {first}"
        )


def _accuracy(run: Run) -> Iterator[Problem]:
    """An accuracy counts whole images, and the attacked ones among them."""
    right = run.column("correct")
    for score in run.record.utility:
        if score.metric != "accuracy" or score.value is None or right is None or not right:
            continue
        if not all(isinstance(one, bool) for one in right):
            return  # attributes: shares of an image
        count = score.value * score.n
        if abs(count - round(count)) > 1e-3:
            yield Problem(
                f"an accuracy of {score.value} over {score.n} images counts no whole image"
            )
        known = sum(map(bool, right))
        if not known - 0.5 <= count <= score.n - (len(right) - known) + 0.5:
            yield Problem(
                f"an accuracy of {score.value} over {score.n} images contradicts the "
                f"attacked ones, of which {known} of {len(right)} are told rightly"
            )


def _built_in(name: str) -> bool:
    return any(entry.name == name and entry.origin == "mibench" for entry in metrics.entries())


# --- suites --------------------------------------------------------------------------------------


def suite(run: Run) -> Iterator[Problem]:
    """The worst of several attacks is the worst of their own values."""
    parts = [part for part in run.record.suite if part.scores]
    for score in run.record.scores if parts else []:
        values = run.values(score.metric)
        own = {part.attack: run.values(f"{part.attack}_{score.metric}") for part in parts}
        if values is None or any(one is None for one in own.values()):
            continue  # told by record-means
        table = torch.stack([one for one in own.values() if one is not None])
        harm = table if score.higher_is_better else -table
        worst, shares = harm.max(0).values, credit(harm).tolist()
        wrong = (values - (worst if score.higher_is_better else -worst)).abs() > 1e-9
        if bool(wrong.any()):
            yield Problem(
                f"{score.metric} of {int(wrong.sum())} images is not the worst of the attacks' own"
            )
        for part, share in zip(parts, shares, strict=True):
            if _differ(part.share_of_worst.get(score.metric), share):
                yield Problem(
                    f"{part.attack} is the worst in {score.metric} for a share of {share:.4g}, not "
                    f"{_told(part.share_of_worst.get(score.metric))}"
                )
    seconds = [part.seconds_per_image for part in parts if part.seconds_per_image is not None]
    if parts and _differ(run.record.seconds_per_image, sum(seconds)):
        yield Problem("seconds_per_image is not the sum of the attacks' own")


def of_part(whole: Run, part: Run) -> Iterator[Problem]:
    """A part of a suite tells the same in both places.

    Args:
        whole: the suite.
        part: the run of one of its attacks.
    """
    name = part.record.attack.name
    listed = next(one for one in whole.record.suite if one.attack == part.folder.name)
    if listed.scores != part.record.scores:
        yield Problem("its scores differ from those that the suite lists")
    for field in ("protocol", "defense", "backbone", "seed", "manifest", "data"):
        one, other = getattr(whole.record, field), getattr(part.record, field)
        if field == "protocol":
            one, other = one.content, other.content
        if one != other:
            yield Problem(f"its {field} differs from the suite's")
    for score in part.record.scores:
        ours, theirs = part.values(score.metric), whole.values(f"{listed.attack}_{score.metric}")
        if ours is not None and theirs is not None and not torch.equal(ours, theirs):
            yield Problem(f"its per-image values of {score.metric} differ from the suite's")
    for entry in part.record.calibration:
        if entry not in whole.record.calibration:
            yield Problem(f"the suite does not repeat the calibration of {name}")


# --- scored again --------------------------------------------------------------------------------


def rescored(run: Run) -> Iterator[Problem]:
    """The stored reconstructions, scored against the images that the protocol names.

    A stored image is rounded to 8 bits, so each pixel differs by at most `ROUNDED` from the scored
    one. The root of the MSE can then differ by as much, which also bounds the PSNR; SSIM and LPIPS
    may differ by `LOOSE`.
    """
    originals = _originals(run)
    if isinstance(originals, str):
        yield Problem(originals, Verdict.SKIPPED)
        return
    images = _stored(run, len(originals))
    if images is None:
        yield Problem("the stored images cannot be scored, see record-counts", Verdict.SKIPPED)
        return
    names = [score.metric for score in run.record.scores if score.value is not None]
    known = [name for name in PIXEL_METRICS if name in names]
    if run.record.suite:
        # Each metric has its own worst attack; the pictures are those of one of them.
        known = [name for name in known if name == FIRST_CHOICE]
    for name in known:
        said = run.values(name)
        if said is None or len(said) != len(images):
            continue
        try:
            found = metrics.load(name)()(images, originals)
        except UnavailableError as error:
            yield Problem(str(error), Verdict.SKIPPED)
            continue
        wrong = (found - said).abs() > _allowed(name, said)
        if bool(wrong.any()):
            first = int(wrong.nonzero()[0])
            yield Problem(
                f"{name} of {int(wrong.sum())} stored images is not the one in the table, such as "
                f"{found[first]:.5g} instead of {said[first]:.5g} of image {first}"
            )


def _allowed(name: str, values: Tensor) -> Tensor:
    """Most that each value may differ after rounding."""
    if name not in ("mse", "psnr"):
        return torch.full_like(values, LOOSE)
    mse = values if name == "mse" else 10 ** (-values / 10)
    root = mse.clamp_min(0).sqrt()
    if name == "mse":
        return (root + ROUNDED).square() - mse + 1e-9
    nearer = (root - ROUNDED).clamp_min(10 ** (-PEAK_PSNR / 20))
    farther = root + ROUNDED
    return 20 * torch.maximum(farther.log10() - root.log10(), root.log10() - nearer.log10()) + 1e-6


def _originals(run: Run) -> Tensor | str:
    """The attacked images of the protocol, or why they are not at hand."""
    rule = run.record.protocol.values.get("data")
    try:
        data = DataRule.model_validate(rule)
    except ValueError:
        return "the record does not say which images are private"
    built_in = any(e.name == data.dataset and e.origin == "mibench" for e in datasets.entries())
    if is_folder(data.dataset) or not built_in:
        return f"{data.dataset} is no dataset of mibench; its images are not read"
    if data.dataset != "procedural" and (run.data_root is None or run.cache is None):
        return "the images are not at hand; give their folder with --data-root"
    if run.cache is None:
        return "there is no folder for decoded images"
    try:
        source = open_dataset(data.dataset, data.image_size, run.data_root, run.cache)
        private, chosen = private_images(source, data)
    except MibenchError as error:
        return str(error)
    if run.manifest is not None and private.hashes() != run.manifest:
        return "the private images at hand are not those of the manifest"
    return private.at(chosen).images()


def _stored(run: Run, count: int) -> Tensor | None:
    try:
        arrays = [np.array(Image.open(path, formats=("PNG",))) for path in run.pictures()]
        pixels = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    except Exception:
        return None
    side = run.record.data.image_size if run.record.data else 0
    return pixels.float() / 255 if pixels.shape == (count, 3, side, side) else None


# --- plausible -----------------------------------------------------------------------------------


def plausible(run: Run) -> Iterator[Problem]:
    """Values that are possible and that no honest run is likely to give."""
    for place, score in run.placed_scores():
        yield from _unlikely(run, place, score)
    columns = {name: run.values(name) for score in run.record.scores for name in _columns(score)}
    for score in run.record.scores:
        for one, other in combinations(_columns(score), 2):
            a, b = columns[one], columns[other]
            bare = run.record.defense.name == "none" and {one, other} == {
                score.metric, f"undefended_{score.metric}"
            }  # fmt: skip
            if a is not None and b is not None and len(a) > 1 and torch.equal(a, b) and not bare:
                yield Problem(f"{one} and {other} are the same for every image", Verdict.WARNED)
    revision = run.record.provenance.get("revision")
    if isinstance(revision, dict) and revision.get("dirty"):
        yield Problem("the code was changed after its last commit", Verdict.WARNED)


def _columns(score: Score) -> list[str]:
    return [f"{prefix}{score.metric}" for prefix in PLACES.values()]


def _unlikely(run: Run, place: str, score: Score) -> Iterator[Problem]:
    values = run.values(f"{PLACES[place]}{score.metric}")
    if values is None or score.value is None or len(values) < 3:
        return
    what = f"{place}: {score.metric}"
    at_end = _built_in(score.metric) and float(values[0]) in metrics.load(score.metric).bounds
    if bool((values == values[0]).all()) and not at_end:
        yield Problem(f"{what} is {values[0]:.6g} for every image", Verdict.WARNED)
    elif score.ci_low is not None and score.ci_low == score.ci_high and not at_end:
        yield Problem(f"the interval of {what} has no width", Verdict.WARNED)
    elif len(values) >= 8 and score.unit != "share" and _too_round(values):
        yield Problem(f"the values of {what} are rounded to three digits or fewer", Verdict.WARNED)


def _too_round(values: Tensor) -> bool:
    """Whether measured numbers have so few digits that somebody wrote them."""
    whole = bool((values == values.round()).all())  # ranks and counts
    return not whole and bool(((values * 1000) - (values * 1000).round()).abs().max() < 1e-9)
