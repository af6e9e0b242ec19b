"""Values per image of several runs, and what they give together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mibench.board.entries import Held
from mibench.metrics.intervals import estimate_mean, normalised_leakage
from mibench.record import Record, Score
from mibench.scoring import spread
from mibench.strike import interval_seed

DIGITS = 9
"""Decimals of numbers that are computed here: other machines differ behind them."""


def column(held: Held, name: str) -> Tensor | None:
    """Values per image (N,), or None where the run has none."""
    if name not in held.table.columns:
        return None
    return torch.tensor(held.table[name].to_numpy(np.float64))


def mean_columns(runs: Sequence[Held], name: str) -> Tensor | None:
    """Values per image, mean over the runs; all of them attacked the same images."""
    found = [column(one, name) for one in runs]
    known = [one for one in found if one is not None]
    return torch.stack(known).mean(0) if len(known) == len(runs) else None


def score_of(record: Record, place: str, metric: str) -> Score | None:
    """The score of a metric among those of one field; None where there is none."""
    return next((one for one in getattr(record, place) if one.metric == metric), None)


def over_seeds(runs: Sequence[Held], like: Score) -> Score:
    """A score as the record has it, or over several seeds: images are resampled, seeds are not."""
    if len(runs) == 1:
        return like
    return _averaged(
        runs, "scores", like, lambda: _summary(runs, like.metric, like.higher_is_better)
    )


def leakage_over_seeds(runs: Sequence[Held], like: Score) -> Score:
    """Normalised leakage, under the name of its metric."""
    own = score_of(runs[0].record, "leakage", f"leakage({like.metric})")
    assert own is not None, "a finished record has one for each score"
    own = own.model_copy(update={"metric": like.metric})
    if len(runs) == 1:
        return own
    return _averaged(runs, "leakage", own, lambda: _share(runs, like))


def _averaged(
    runs: Sequence[Held], place: str, like: Score, compute: Callable[[], dict[str, object] | None]
) -> Score:
    name = f"leakage({like.metric})" if place == "leakage" else like.metric
    parts = [score_of(one.record, place, name) for one in runs]
    lacking = next((one for one in parts if one is None or one.value is None), like)
    values = compute() if all(one is not None and one.value is not None for one in parts) else None
    if values is None:
        reason = (lacking.reason if lacking is not None else None) or "a seed has no value"
        blank = dict.fromkeys(("value", "ci_low", "ci_high", "p50", "p95", "worst", "source"))
        return like.model_copy(update={**blank, "n": 0, "reason": reason})
    source = f"mean over seeds {', '.join(str(one.record.seed) for one in runs)}"
    return like.model_copy(update={**rounded(values), "source": source})


def _summary(runs: Sequence[Held], metric: str, higher: bool) -> dict[str, object] | None:
    values = mean_columns(runs, metric)
    if values is None:
        return None
    mean = estimate_mean(values, interval_seed(runs[0].record.seed))
    return {
        "value": mean.value, "ci_low": mean.low, "ci_high": mean.high, "n": mean.n,
        "reason": mean.reason, **spread(values, "higher" if higher else "lower"),
    }  # fmt: skip


def beside_controls(runs: Sequence[Held], metric: str) -> tuple[Tensor, Tensor, Tensor] | None:
    """Values of the attack, the blind guess and the undefended split, (N,) each, over the runs.

    None where one of them is not known.
    """
    values, floor, undefended = (
        mean_columns(runs, f"{prefix}{metric}") for prefix in ("", "prior_only_", "undefended_")
    )
    if values is None or floor is None or undefended is None:
        return None
    return values, floor, undefended


def _share(runs: Sequence[Held], like: Score) -> dict[str, object] | None:
    found = beside_controls(runs, like.metric)
    return None if found is None else leakage_fields(*found, like, runs[0].record.seed)


def leakage_fields(
    values: Tensor, floor: Tensor, undefended: Tensor, like: Score, seed: int
) -> dict[str, object] | None:
    """Normalised leakage as a score has it; None where the undefended split leaks nothing.

    Args:
        values: of the attack, (N,).
        floor: of the blind guess, (N,).
        undefended: of the undefended split, (N,).
        like: a score of the metric.
        seed: of the run.
    """
    found = normalised_leakage(
        values,
        floor,
        undefended,
        more_leakage="higher" if like.higher_is_better else "lower",
        seed=interval_seed(seed),
    )
    if found.value is None:
        return None
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high, "n": found.n,
            "reason": found.reason}  # fmt: skip


def rounded(values: Mapping[str, object]) -> dict[str, object]:
    """The same values, floats with `DIGITS` decimals."""
    return {k: round(v, DIGITS) if isinstance(v, float) else v for k, v in values.items()}


def accuracy_of(runs: Sequence[Held]) -> tuple[float, float, dict[str, float]]:
    """Accuracy, points of it that are lost, and the same of every kind of accuracy."""
    lost: dict[str, float] = {}
    for name in ("accuracy", "balanced accuracy"):
        pairs = [
            (bare.value, own.value)
            for run in runs
            for own, bare in [
                (
                    score_of(run.record, "utility", name),
                    score_of(run.record, "utility", f"undefended {name}"),
                )
            ]
            if own is not None and bare is not None
            if own.value is not None and bare.value is not None
        ]
        if pairs:
            lost[name] = round(100 * sum(b - o for b, o in pairs) / len(pairs), DIGITS)
    values = [score_of(run.record, "utility", "accuracy") for run in runs]
    known = [one.value for one in values if one is not None and one.value is not None]
    accuracy = sum(known) / len(known) if known else float("nan")
    return round(accuracy, DIGITS), lost.get("accuracy", float("nan")), lost
