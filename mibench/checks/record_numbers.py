"""Checks of a record's numbers: all that follows from per-image values and stored images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
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
from mibench.job import SUITE
from mibench.metrics.base import Metric
from mibench.metrics.intervals import Estimate, estimate_mean, normalised_leakage
from mibench.outputs import (
    GUESSES,
    PERMUTED,
    PRIOR_SAMPLE,
    RECONSTRUCTIONS,
    SAME_FOR_ALL,
    UNDEFENDED,
)
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
EXACT = {"mse": 1e-6, "psnr": 1e-3, "ssim": 1e-4, "lpips": 0.005}
"""Most that another machine may make of the same stored image, by metric, in its unit."""
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


def of_parts(whole: Run, parts: Mapping[str, Run]) -> Iterator[Problem]:
    """The controls of a suite are the worst of the controls of its attacks, and none is missing.

    Args:
        whole: the suite.
        parts: the runs of its attacks that have scores, by name.
    """
    for place in ("undefended", "permuted"):
        for score in getattr(whole.record, place):
            name = PLACES[place] + score.metric
            values, own = whole.values(name), [part.values(name) for part in parts.values()]
            known = [one for one in own if one is not None]
            if (
                values is None
                or len(known) != len(own)
                or {len(one) for one in known} != {len(values)}
            ):
                continue  # told by record-means or record-counts
            table = torch.stack(known)
            worst = table.max(0)[0] if score.higher_is_better else table.min(0)[0]
            wrong = int(((values - worst).abs() > 1e-9).sum())
            if wrong:
                yield Problem(f"{place}: {score.metric} of {wrong} images is not the worst of the "
                              "attacks' own")  # fmt: skip
    asked = {part.attack.partition("@")[0] for part in whole.record.suite}
    meant = set(whole.rule("attacks")) if whole.record.attack.name == SUITE else asked
    if missing := sorted(meant - asked):
        yield Problem(f"the suite lacks {', '.join(missing)} of the protocol's attacks")
    for part in whole.record.suite:
        if not part.scores:
            text = f"{part.attack} is said not to apply: {part.reason}"
            yield Problem(text, Verdict.WARNED)


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
    """The stored images, scored against those that the protocol names: attack and controls.

    From format 4 on, what is stored is what was scored. Before, a stored image was rounded to 8
    bits afterwards, so each pixel differs by at most `ROUNDED` from the scored one; the root of the
    MSE can then differ by as much, which also bounds the PSNR, and SSIM and LPIPS by `LOOSE`.
    """
    originals = attacked_images(run)
    if isinstance(originals, str):
        yield Problem(originals, Verdict.SKIPPED)
        return
    for place, folder in _STORED.items():
        if folder != RECONSTRUCTIONS and folder not in run.record.files:
            continue
        images = _stored(run, folder, len(originals))
        if images is None:
            yield Problem(f"the images in {folder} cannot be scored", Verdict.SKIPPED)
            continue
        names = [score.metric for score in getattr(run.record, place) if score.value is not None]
        known = [name for name in PIXEL_METRICS if name in names]
        if run.record.suite:
            # Each metric has its own worst attack; the pictures are those of one of them.
            known = [name for name in known if name == FIRST_CHOICE]
        for name in known:
            yield from _scored_again(run, place, name, images, originals)
    if GUESSES in run.record.files:
        yield from _guesses_again(run, originals)


_STORED = {"scores": RECONSTRUCTIONS, "undefended": UNDEFENDED, "permuted": PERMUTED}
"""Where the images lie that a field of a record scores."""


def _guesses_again(run: Run, originals: Tensor) -> Iterator[Problem]:
    """The blind guess that the floor names, for each metric."""
    for score in run.record.prior_only:
        if score.value is None or score.metric not in PIXEL_METRICS:
            continue
        if score.source in SAME_FOR_ALL:
            paths = [run.folder / GUESSES / f"{score.source}.png"] * len(originals)
        elif score.source == PRIOR_SAMPLE:
            paths = run.pictures(PRIOR_SAMPLE)
        else:
            continue  # told by record-facts
        images = _read(run, paths, len(originals))
        if images is None:
            yield Problem(f"the guess {score.source} cannot be scored", Verdict.SKIPPED)
        else:
            yield from _scored_again(run, "prior_only", score.metric, images, originals)


def _scored_again(
    run: Run, place: str, name: str, images: Tensor, originals: Tensor
) -> Iterator[Problem]:
    said = run.values(PLACES[place] + name)
    if said is None or len(said) != len(images):
        return
    try:
        found = metrics.load(name)()(images, originals)
    except UnavailableError as error:
        yield Problem(str(error), Verdict.SKIPPED)
        return
    exact = run.record.format_version >= CONTROLLED
    allowed = torch.full_like(said, EXACT[name]) if exact else _allowed(name, said)
    wrong = (found - said).abs() > allowed
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        yield Problem(
            f"{place}: {name} of {int(wrong.sum())} stored images is not the one in the table, "
            f"such as {found[first]:.5g} instead of {said[first]:.5g} of image {first}"
        )


def _allowed(name: str, values: Tensor) -> Tensor:
    """Most that each value may differ where images were rounded after they were scored."""
    if name not in ("mse", "psnr"):
        return torch.full_like(values, LOOSE)
    mse = values if name == "mse" else 10 ** (-values / 10)
    root = mse.clamp_min(0).sqrt()
    if name == "mse":
        return (root + ROUNDED).square() - mse + 1e-9
    nearer = (root - ROUNDED).clamp_min(10 ** (-PEAK_PSNR / 20))
    farther = root + ROUNDED
    return 20 * torch.maximum(farther.log10() - root.log10(), root.log10() - nearer.log10()) + 1e-6


def attacked_images(run: Run) -> Tensor | str:
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


def _stored(run: Run, folder: str, count: int) -> Tensor | None:
    return _read(run, run.pictures(folder), count)


def _read(run: Run, paths: Sequence[Path], count: int) -> Tensor | None:
    """Pictures as (count, 3, H, W) in [0, 1]; None where they are of another number or size."""
    side = run.record.data.image_size if run.record.data else 0
    if len(paths) != count:
        return None
    arrays = []
    for path in paths:
        try:
            with Image.open(path, formats=("PNG",)) as image:
                # A huge image is refused by its size, before it is decoded.
                if (image.size, image.mode) != ((side, side), "RGB"):
                    return None
                arrays.append(np.array(image))
        except Exception:
            return None
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


# --- plausible -----------------------------------------------------------------------------------


def _telling(values: Tensor) -> bool:
    """Whether values differ at all: two columns of zeros are equal by no accident."""
    return bool((values != values[0]).any())


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
            if a is not None and b is not None and _telling(a) and torch.equal(a, b) and not bare:
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
    ranks = 1 / values
    whole = whole or bool((ranks - ranks.round()).abs().max() < 1e-9)  # reciprocal ranks
    return not whole and bool(((values * 1000) - (values * 1000).round()).abs().max() < 1e-9)
