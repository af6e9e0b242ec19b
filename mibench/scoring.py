"""From images to scores: per image first, then means with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from mibench.errors import UnavailableError
from mibench.exhibit import Exhibit
from mibench.metrics.base import Metric
from mibench.metrics.distribution import SET_METRICS, SetMetric
from mibench.metrics.intervals import (
    Estimate,
    balanced_accuracy,
    balanced_per_attribute,
    estimate_mean,
    normalised_leakage,
)
from mibench.record import AttributeScore, Score
from mibench.registry import metrics
from mibench.task import Attributes, Task

T = TypeVar("T")


@dataclass(frozen=True)
class Scores:
    """Scores of one set of reconstructions.

    Attributes:
        summary: mean and interval of each metric, in the protocol's order.
        per_image: values (N,) by metric; a metric that could not be computed is missing.
    """

    summary: list[Score]
    per_image: dict[str, Tensor]

    def named(self, source: str) -> Scores:
        """Says what the images are."""
        named = [score.model_copy(update={"source": source}) for score in self.summary]
        return Scores(named, self.per_image)

    def columns(self, prefix: str) -> dict[str, Tensor]:
        """The per-image values under prefixed names."""
        return {f"{prefix}{name}": values for name, values in self.per_image.items()}

    @staticmethod
    def joined(parts: Sequence[Scores]) -> Scores:
        """Puts scores of several metrics together."""
        summary = [score for part in parts for score in part.summary]
        per_image = {name: values for part in parts for name, values in part.per_image.items()}
        return Scores(summary, per_image)


def score(names: Sequence[str], images: Tensor, exhibit: Exhibit, seed: int) -> Scores:
    """Scores reconstructions (N, 3, H, W) in [0, 1] against what they are held against."""
    summary, per_image = [], {}
    for name in names:
        metric = _metric(name)
        try:
            asked = metric.bound(exhibit)
            values = _tried(name, partial(asked, images, exhibit.originals))
        except UnavailableError as error:
            summary.append(_as_score(metric, Estimate(None, None, None, 0, str(error))))
            continue
        per_image[name] = values
        summary.append(_summed_up(metric, values, seed))
    return Scores(summary, per_image)


def score_sets(
    sets: Mapping[str, Tensor], originals: Tensor, seed: int, device: str
) -> list[Score]:
    """Scores each set of reconstructions (N, 3, H, W) as a whole; its name becomes the source."""
    found = []
    theirs = originals.to(device)
    for source, images in sets.items():
        for metric in SET_METRICS:
            try:
                estimate = _tried(metric.name, partial(metric, images, theirs, seed))
            except UnavailableError as error:
                estimate = Estimate(None, None, None, 0, str(error))
            found.append(_as_score(metric, estimate).model_copy(update={"source": source}))
    return found


@dataclass(frozen=True)
class WorstScores:
    """The most harmful of several reconstructions, for each image and each metric on its own.

    Attributes:
        scores: of those reconstructions.
        chosen: by metric, the attack that each image's value comes from: of equals, the first.
        shares: by metric, the share of the images for which each was the worst; see `credit`.
    """

    scores: Scores
    chosen: dict[str, list[str]]
    shares: dict[str, dict[str, float]]


def credit(harm: Tensor) -> Tensor:
    """The share of the images for which each of several attacks was the worst, (attacks,).

    Attacks that do the same harm to an image share it equally, so that all shares add up to 1.

    Args:
        harm: what each attack does to each image, (attacks, images); higher is worse.
    """
    worst = (harm == harm.max(0).values).double()
    return (worst / worst.sum(0)).mean(1)


def worst_of(parts: Mapping[str, Scores], seed: int) -> WorstScores:
    """Takes the most harmful of several reconstructions, for each image and metric on its own.

    Args:
        parts: scores of the same images, by attack.
        seed: of the intervals.

    """
    attackers, first = list(parts), next(iter(parts.values()))
    summary, per_image, chosen, shares = [], {}, {}, {}
    for given in first.summary:
        name, metric = given.metric, _metric(given.metric)
        if name not in first.per_image:
            summary.append(given)
            continue
        values = torch.stack([part.per_image[name] for part in parts.values()])
        harm = values if metric.more_leakage == "higher" else -values
        best = harm.argmax(0)
        per_image[name] = values.gather(0, best[None])[0]
        chosen[name] = [attackers[at] for at in best.tolist()]
        shares[name] = dict(zip(attackers, credit(harm).tolist(), strict=True))
        summary.append(_summed_up(metric, per_image[name], seed))
    return WorstScores(Scores(summary, per_image), chosen, shares)


def gained(before: Scores, after: Scores) -> dict[str, float]:
    """How much more leaks on average in ``after``, by metric, in its unit; below 0 is less."""
    found = {}
    for name in before.per_image:
        change = float((after.per_image[name] - before.per_image[name]).mean())
        found[name] = change if _metric(name).more_leakage == "higher" else -change
    return found


def leakage_scores(scores: Scores, floor: Scores, undefended: Scores, seed: int) -> list[Score]:
    """Normalised leakage per metric: (score - floor) / (undefended - floor), paired per image."""
    found = []
    for summary in scores.summary:
        metric = _metric(summary.metric)
        if summary.metric in scores.per_image:
            estimate = normalised_leakage(
                scores.per_image[summary.metric],
                floor.per_image[summary.metric],
                undefended.per_image[summary.metric],
                more_leakage=metric.more_leakage,
                seed=seed,
            )
        else:
            estimate = Estimate(None, None, None, 0, summary.reason)
        base = _as_score(metric, estimate)
        found.append(
            base.model_copy(
                update={
                    "metric": f"leakage({summary.metric})",
                    "unit": "share of the undefended leakage",
                    "higher_is_better": True,
                }
            )
        )
    return found


def utility_scores(
    prefix: str, task: Task, logits: Tensor | None, labels: Tensor, seed: int
) -> list[Score]:
    """Accuracy of a model, and for attributes the balanced accuracy.

    Args:
        prefix: what stands before ``accuracy`` in the scores' names, such as ``"undefended "``.
        task: what the labels mean.
        logits: (N, outputs), or None where these images have no labels of the task.
        labels: of the same images.
        seed: of the intervals.
    """
    if logits is None:
        reason = "the attacker's images are of another dataset, without these labels"
        return [_share(f"{prefix}accuracy", Estimate(None, None, None, 0, reason))]
    scores = [_share(f"{prefix}accuracy", estimate_mean(task.correct(logits, labels), seed))]
    if isinstance(task, Attributes):
        balanced = balanced_accuracy(logits > 0, labels.bool(), seed)
        scores.append(_share(f"{prefix}balanced accuracy", balanced))
    return scores


def attribute_scores(
    task: Task, logits: Tensor, undefended: Tensor, labels: Tensor
) -> list[AttributeScore]:
    """Accuracy and balanced accuracy of each attribute; nothing for classes."""
    if not isinstance(task, Attributes):
        return []
    truth = labels.bool()
    models = [
        (model > 0, balanced_per_attribute(model > 0, truth)) for model in (logits, undefended)
    ]
    (told, balanced), (told_bare, balanced_bare) = models
    return [
        AttributeScore(
            name=name,
            accuracy=(told[:, at] == truth[:, at]).float().mean().item(),
            balanced_accuracy=balanced[at],
            undefended_accuracy=(told_bare[:, at] == truth[:, at]).float().mean().item(),
            undefended_balanced_accuracy=balanced_bare[at],
        )
        for at, name in enumerate(task.names)
    ]


def _share(name: str, estimate: Estimate) -> Score:
    return Score(
        metric=name, version=1, unit="share", higher_is_better=True, value=estimate.value,
        ci_low=estimate.low, ci_high=estimate.high, n=estimate.n, reason=estimate.reason,
    )  # fmt: skip


def _metric(name: str) -> Metric:
    if name not in _LOADED:
        _LOADED[name] = metrics.load(name)()
    return _LOADED[name]


# A metric may hold a network; one instance serves a whole process.
_LOADED: dict[str, Metric] = {}
# What could not be had once is not waited for again.
_MISSING: dict[str, UnavailableError] = {}


def _tried(name: str, call: Callable[[], T]) -> T:
    """Calls a metric, unless it is known to be out of reach here."""
    if name in _MISSING:
        raise _MISSING[name]
    try:
        return call()
    except UnavailableError as error:
        _MISSING[name] = error
        raise


def spread(values: Tensor, more_leakage: str) -> dict[str, float]:
    """How bad values (N,) are for those whom they hit worst: median, 95th percentile, worst."""
    sign = 1 if more_leakage == "higher" else -1
    p50, p95 = sign * torch.quantile(sign * values, torch.tensor([0.5, 0.95], dtype=values.dtype))
    return {"p50": float(p50), "p95": float(p95), "worst": float(sign * (sign * values).max())}


def _summed_up(metric: Metric, values: Tensor, seed: int) -> Score:
    """Mean with its interval, and the spread."""
    summary = _as_score(metric, estimate_mean(values, seed))
    return summary.model_copy(update=spread(values, metric.more_leakage))


def summed_up(name: str, values: Tensor, seed: int) -> Score:
    """The score of a metric from its values (N,), as they were kept."""
    return _summed_up(_metric(name), values, seed)


def unavailable(name: str, reason: str) -> Score:
    """The score of a metric that cannot be computed, and why."""
    return _as_score(_metric(name), Estimate(None, None, None, 0, reason))


def _as_score(metric: Metric | SetMetric, estimate: Estimate) -> Score:
    return Score(
        metric=metric.name, version=metric.version, unit=metric.unit,
        higher_is_better=metric.more_leakage == "higher", value=estimate.value,
        ci_low=estimate.low, ci_high=estimate.high, n=estimate.n, reason=estimate.reason,
    )  # fmt: skip
