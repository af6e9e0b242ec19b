"""Checks of what a record says beside its per-image values: judge, cost, information, data.

Most of these numbers cannot be computed again from the files. They can contradict their
definitions, the protocol and each other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mibench.checks.base import Verdict
from mibench.checks.record_run import Problem, Run
from mibench.judge import ROLE
from mibench.metrics.distribution import SET_METRICS
from mibench.outputs import PRIOR_SAMPLE, SAME_FOR_ALL
from mibench.protocol import ROLES, SSIM_WINDOW
from mibench.record import CONTROLLED, Cost, Score
from mibench.registry import measures

BARE = ("mse", "psnr", "ssim")
"""Metrics that need a pair of images and nothing else, so nothing excuses their absence."""
WIDEST = 8
"""Bytes of a value, at most."""
FAR = 6.0
"""Standard deviations between the attacked images' accuracy and that of all, which chance does not
give."""


def facts(run: Run) -> Iterator[Problem]:
    """All of them."""
    yield from _present(run)
    yield from _judge(run)
    yield from _data(run)
    if run.record.cost is not None:
        yield from _cost(run.record.cost)
    for place in ("information", "information_undefended", "distribution", "utility"):
        for score in getattr(run.record, place):
            yield from _possible(place, score)
    yield from _information(run)
    yield from _utility(run)


def _present(run: Run) -> Iterator[Problem]:
    """What a run always has cannot be left out."""
    side = run.record.data.image_size if run.record.data is not None else 0
    for place, score in run.placed_scores():
        small = score.metric == "ssim" and side < SSIM_WINDOW
        if score.metric in BARE and score.value is None and not small:
            yield Problem(f"{place} has no {score.metric}, which needs nothing but the images")
    for score in run.record.prior_only:
        if score.value is not None and score.source not in (*SAME_FOR_ALL, PRIOR_SAMPLE):
            yield Problem(f"prior_only of {score.metric} is of {score.source!r}, which is no guess")
    # A run that was scored anew keeps what an older format did not have.
    if run.record.format_version < CONTROLLED or run.record.supersedes is not None:
        return
    known = {one.name for one in measures.entries() if one.origin == "mibench"}
    for place in ("information", "information_undefended"):
        if missing := known - {score.metric for score in getattr(run.record, place)}:
            yield Problem(f"{place} lacks {', '.join(sorted(missing))}")
    there = {score.metric for score in run.record.distribution if score.source == "attack"}
    if missing := {one.name for one in SET_METRICS} - there:
        yield Problem(f"distribution lacks {', '.join(sorted(missing))} of the attack")


def _judge(run: Run) -> Iterator[Problem]:
    record, rule, judge = run.record, run.rule("judge"), run.record.judge
    if judge is None:
        recognised = [one.metric for one in record.scores if one.value is not None]
        if {"recognition", "reid-top1", "reid-top5", "reid-mrr"} & set(recognised):
            yield Problem("images were recognised, and the record does not say by which judge")
        other = run.rule("adversary").get("auxiliary") == "other"
        if rule and not other and record.supersedes is None:
            yield Problem("the protocol names a judge, and the record has none")
        return
    attacked = run.attacked
    if judge.trained_on != ROLE:
        yield Problem(f"the judge has learned from the role {judge.trained_on!r}, not {ROLE!r}")
    right = judge.accuracy * attacked
    whole = record.attributes or abs(right - round(right)) < 1e-3
    if not 0 <= judge.accuracy <= 1 or not whole:
        yield Problem(f"a judge's accuracy of {judge.accuracy} over {attacked} images is none")
    wanted = rule.get("gallery")
    if judge.gallery and isinstance(wanted, int) and judge.gallery != max(wanted, attacked):
        yield Problem(f"the gallery has {judge.gallery} images, not the protocol's {wanted}")


def _data(run: Run) -> Iterator[Problem]:
    record, rule = run.record, run.rule("data")
    for role, count in record.near_copies.items():
        if role not in ROLES or role == "private" or not 0 < count <= run.attacked:
            yield Problem(f"near_copies says {count} of the role {role!r}")
    if record.data is None:
        return
    for role in ROLES:
        part = rule.get(role)
        meant = part.get("count") if isinstance(part, Mapping) else None
        out, there = record.data.left_out.get(role, 0), record.data.images.get(role)
        if isinstance(meant, int) and (out < 0 or there != meant - out):
            yield Problem(
                f"the role {role!r} has {there} images and {out} left out, not the protocol's "
                f"{meant}"
            )


def _cost(cost: Cost) -> Iterator[Problem]:
    counts = {
        name: value
        for name, value in cost.model_dump(exclude={"values_per_server", "latency_ratio"}).items()
        if value is not None and value < 0
    }
    for name, value in counts.items():
        yield Problem(f"{name} is {value}")
    values = sum(cost.values_per_server)
    if min(cost.values_per_server, default=0) < 1:
        yield Problem(f"servers receive {cost.values_per_server} values")
    elif not values <= cost.bytes_up <= WIDEST * values:
        yield Problem(f"{cost.bytes_up} bytes are sent for {values} values")
    if cost.latency_ratio is not None:
        yield from _possible("cost", cost.latency_ratio)
        if cost.latency_ratio.value is not None and cost.latency_ratio.value <= 0:
            yield Problem(f"latency_ratio is {cost.latency_ratio.value}")


def _possible(place: str, score: Score) -> Iterator[Problem]:
    """What holds of every number with an interval."""
    if score.n < 0:
        yield Problem(f"{place}: {score.metric} rests on {score.n} images")
    ends = (score.ci_low, score.value, score.ci_high)
    known = [one for one in ends if one is not None]
    if known != sorted(known):
        yield Problem(f"{place}: {score.metric} is {score.value}, outside its own interval")


def _information(run: Run) -> Iterator[Problem]:
    entries = {one.name for one in measures.entries() if one.origin == "mibench"}
    for place in ("information", "information_undefended"):
        for score in getattr(run.record, place):
            if score.metric not in entries:
                continue
            known = measures.load(score.metric)
            said = (score.unit, score.higher_is_better)
            if said != (known.unit, known.higher_is_better):
                yield Problem(f"{place}: {score.metric} has the unit or direction of another one")
            low, high = _BOUNDS.get(score.metric, (-float("inf"), float("inf")))
            if score.value is not None and not low <= score.value <= high:
                yield Problem(f"{place}: {score.metric} of {score.value} lies outside its range")


_BOUNDS: Mapping[str, Sequence[float]] = {
    "conditional-entropy-bound": (0.0, float("inf")),
    "vib-kl": (0.0, float("inf")),
    "distance-correlation": (-1.0, 1.0 + 1e-9),
    "volume": (0.0, float("inf")),
    "volume-coded": (0.0, float("inf")),
    "siftfunnel-mine": (-1.0, 1.0),
}


def _utility(run: Run) -> Iterator[Problem]:
    """The attacked images are the first of all, so their accuracy is much like that of all."""
    found = {score.metric: score for score in run.record.utility}
    if "accuracy" not in found or "undefended accuracy" not in found:
        yield Problem("utility lacks the accuracy, or that of the undefended model")
    score, right = found.get("accuracy"), run.column("correct")
    if score is None or score.value is None or not right:
        return
    if not all(isinstance(one, bool) for one in right):
        return  # attributes: shares of an image
    share, chance = sum(map(bool, right)) / len(right), score.value * (1 - score.value)
    if abs(share - score.value) > FAR * max(chance, 1 / len(right)) ** 0.5 / len(right) ** 0.5:
        yield Problem(
            f"an accuracy of {score.value:.4g} is far from that on the attacked images, "
            f"{share:.4g}",
            Verdict.WARNED,
        )
