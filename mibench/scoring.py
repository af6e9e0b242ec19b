"""From images to scores: per image first, then means with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mibench.errors import UnavailableError
from mibench.metrics.base import Metric
from mibench.metrics.intervals import Estimate, estimate_mean, normalised_leakage
from mibench.record import Score
from mibench.registry import metrics


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


def score(names: Sequence[str], images: Tensor, originals: Tensor, seed: int) -> Scores:
    """Scores reconstructions (N, 3, H, W) in [0, 1] against their originals."""
    summary, per_image = [], {}
    for name in names:
        metric = _metric(name)
        try:
            if name in _MISSING:
                raise _MISSING[name]
            values = metric(images, originals)
        except UnavailableError as error:
            _MISSING[name] = error
            summary.append(_as_score(metric, Estimate(None, None, None, 0, str(error))))
            continue
        per_image[name] = values
        summary.append(_as_score(metric, estimate_mean(values, seed)))
    return Scores(summary, per_image)


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


def accuracy_score(name: str, correct: Tensor, seed: int) -> Score:
    """Accuracy from one 0 or 1 per image."""
    estimate = estimate_mean(correct, seed)
    return Score(
        metric=name, version=1, unit="share of images", higher_is_better=True,
        value=estimate.value, ci_low=estimate.low, ci_high=estimate.high, n=estimate.n,
    )  # fmt: skip


def _metric(name: str) -> Metric:
    if name not in _LOADED:
        _LOADED[name] = metrics.load(name)()
    return _LOADED[name]


# A metric may hold a network; one instance serves a whole process.
_LOADED: dict[str, Metric] = {}
# What could not be had once is not waited for again.
_MISSING: dict[str, UnavailableError] = {}


def _as_score(metric: Metric, estimate: Estimate) -> Score:
    return Score(
        metric=metric.name, version=metric.version, unit=metric.unit,
        higher_is_better=metric.higher_is_better, value=estimate.value, ci_low=estimate.low,
        ci_high=estimate.high, n=estimate.n, reason=estimate.reason,
    )  # fmt: skip
