"""A record in words and numbers.

Worded so that nobody mistakes a good reconstruction for a good defense: every metric says in which
direction more of the private image has leaked.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from mibench.record import AdversaryFacts, Cost, Record, Score

DIGITS = {"mse": 4, "psnr": 2, "fid": 1, "kid": 4}
"""Decimals by metric; all others have three."""


def print_record(console: Console, record: Record) -> None:
    """Prints what a record says: scores with controls, accuracy, cost, adversary, deviations."""
    name = f"{record.defense.name} against {record.attack.name}"
    protocol = record.protocol
    console.print(
        f"{name}, protocol {protocol.id} ({protocol.content}), seed {record.seed}: "
        f"{'ranked' if protocol.ranked else 'not ranked'}",
        soft_wrap=True,
    )
    if record.status == "started":
        console.print(
            f"This run began at {record.started} and has not finished; the same command goes on.",
            soft_wrap=True,
        )
        return
    if record.status == "error":
        console.print(f"This run failed: {record.error}", soft_wrap=True)
        return
    console.print(_scores(record))
    if record.suite:
        console.print(_suite(record))
    if record.information:
        console.print(_information(record))
    for line in _below(record):
        console.print(line, soft_wrap=True)


def _scores(record: Record) -> Table:
    images = max((score.n for score in record.scores), default=0)
    table = Table(
        title=f"Leakage of {images} private images: mean with its 95 % interval, median, what 5 % "
        "exceed, the worst;\nnormalised leakage: 0 is a blind guess, 1 the undefended split",
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("metric")
    table.add_column("images compared")
    table.add_column("mean", justify="right")
    table.add_column("95 % interval")
    for name in ("median", "p95", "worst"):
        table.add_column(name, justify="right")
    for index, score in enumerate(record.scores):
        rows = [
            ("undefended, same attack", record.undefended[index]),
            (record.defense.name, score),
            (f"blind guess ({record.prior_only[index].source})", record.prior_only[index]),
            ("attack on permuted shares", record.permuted[index]),
            ("normalised leakage", record.leakage[index]),
        ]
        head = _head(score)
        if all(one.value is None for _, one in rows):
            table.add_row(head[0], "not computed, see below", "-", "", end_section=True)
            continue
        for at, (label, one) in enumerate(rows):
            digits = DIGITS.get(one.metric, 3)
            last = at == len(rows) - 1
            first = head[at] if at < len(head) else ""
            spread = ["" if v is None else f"{v:.{digits}f}" for v in (one.p50, one.p95, one.worst)]
            table.add_row(first, label, *_cells(one, digits), *spread, end_section=last)
    return table


def _information(record: Record) -> Table:
    """What the shares tell, whatever the attack."""
    images = max(score.n for score in record.information)
    table = Table(
        title=f"What the shares tell, whatever the attack, of {images} of the attacker's images",
        title_justify="left",
    )
    table.add_column("measure", no_wrap=True)
    table.add_column("value", justify="right")
    table.add_column("95 % interval")
    table.add_column("undefended", justify="right")
    table.add_column("how")
    bare = {score.metric: score.value for score in record.information_undefended}
    for score in record.information:
        other = bare.get(score.metric)
        undefended = "-" if other is None else _short(other)
        if score.value is None:
            table.add_row(score.metric, "-", "-", undefended, score.reason)
            continue
        unit = f" {score.unit}" if score.unit else ""
        interval = "-"
        if score.ci_low is not None and score.ci_high is not None:
            interval = f"{_short(score.ci_low)} to {_short(score.ci_high)}"
        value = f"{_short(score.value)}{unit}"
        table.add_row(score.metric, value, interval, undefended, score.source or "")
    return table


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _head(score: Score) -> list[str]:
    unit = f" ({score.unit})" if score.unit else ""
    direction = "higher" if score.higher_is_better else "lower"
    return [f"{score.metric.upper()}{unit}", f"{direction} = more", "leaked"]


def _cells(score: Score, digits: int) -> tuple[str, str]:
    if score.value is None:
        return "-", "see below"
    value = f"{score.value:.{digits}f}"
    if score.ci_low is None or score.ci_high is None:
        return value, "see below" if score.reason else "-"
    return value, f"{score.ci_low:.{digits}f} to {score.ci_high:.{digits}f}"


def _below(record: Record) -> Iterable[str]:
    for part in record.suite:
        if part.reason is not None:
            yield f"Left out: {part.attack}, {part.reason}"
    yield from _reasons(record)
    yield from _judge(record)
    yield from _distribution(record)
    utility = {score.metric: score for score in record.utility}
    for name in ("accuracy", "balanced accuracy"):
        if name in utility:
            yield _accuracy(name, utility[name], utility[f"undefended {name}"])
    if record.attributes:
        yield (
            f"  over {len(record.attributes)} attributes; each one's accuracy is in the record, "
            "under attributes"
        )
    yield from _strength(record)
    if record.cost is not None:
        yield from _cost(record.cost)
    if record.adversary is not None:
        yield from _adversary(record.adversary, record.cost)
    if record.seconds_per_image is not None:
        yield f"Reconstruction: {record.seconds_per_image:.2g} s per image, training not counted"
    if record.deviations:
        yield f"Deviations from the protocol: {'; '.join(record.deviations)}"
    elif not record.protocol.ranked:
        yield f"Not ranked (track of the protocol: {record.protocol.track})"


def _reasons(record: Record) -> Iterable[str]:
    """Why numbers are missing, each reason once with all that it concerns."""
    concerned: dict[str, list[str]] = {}
    groups = {
        "": record.scores,
        "undefended ": record.undefended,
        "blind guess ": record.prior_only,
        "permuted ": record.permuted,
        " ": record.leakage,
    }
    for prefix, scores in groups.items():
        for score in scores:
            if score.reason:
                name = f"{prefix}{score.metric}".strip()
                concerned.setdefault(score.reason, []).append(name)
    for reason, names in concerned.items():
        whole = {score.metric for score in record.scores} & set(names)
        # A metric that is missing altogether is named once, not for every control.
        kept = [n for n in names if n in whole or not any(w in n for w in whole)]
        yield f"No number for {', '.join(kept)}: {reason}"


def _judge(record: Record) -> Iterable[str]:
    """Who recognised the images, and how far it can be trusted."""
    judge = record.judge
    if judge is None:
        return
    among = f"; it seeks them among {judge.gallery:,}" if judge.gallery else ""
    yield (
        f"Judge of what is recognised: {judge.backbone.name}, learned from the {judge.trained_on} "
        f"images, tells {100 * judge.accuracy:.1f} % of the originals rightly{among}"
    )


def _distribution(record: Record) -> Iterable[str]:
    """Scores of the reconstructions as a set, or why there are none."""
    by_name: dict[str, list[Score]] = {}
    for score in record.distribution:
        by_name.setdefault(score.metric, []).append(score)
    for name, scores in by_name.items():
        told = [
            f"{one.source} {value}" + (f" ({interval})" if one.ci_low is not None else "")
            for one in scores
            if one.value is not None
            for value, interval in [_cells(one, DIGITS.get(name, 3))]
        ]
        if told:
            way = "higher" if scores[0].higher_is_better else "lower"
            yield f"{name.upper()} of the images as a set: {', '.join(told)}; {way} = more leaked"
        else:
            yield f"No number for {name}: {scores[0].reason}"


def _accuracy(name: str, defended: Score, undefended: Score) -> str:
    name = name.capitalize()
    if defended.value is None or undefended.value is None:
        return f"{name}: unknown ({defended.reason or undefended.reason})"
    points = 100 * (defended.value - undefended.value)
    return (
        f"{name}: {_percent(defended)}, undefended {_percent(undefended)}: "
        f"{points:+.1f} points (on {defended.n} private images)"
    )


def _suite(record: Record) -> Table:
    """What each attack of a suite did alone."""
    table = Table(
        title="For each image and metric, the worst of these attacks;\nbehind each mean, for what "
        "share of the images it was the worst",
        title_justify="left",
        pad_edge=False,
    )
    # PSNR says what MSE says.
    names = [one.metric for one in record.scores if one.value is not None and one.metric != "mse"]
    table.add_column("attack", no_wrap=True)
    for name in names:
        table.add_column(name.upper(), justify="right", overflow="fold")
    for part in record.suite:
        values = {one.metric: one.value for one in part.scores}
        cells = [
            "-"
            if (value := values.get(name)) is None
            else f"{value:.{DIGITS.get(name, 3)}f} {100 * part.share_of_worst[name]:.0f}%"
            for name in names
        ]
        table.add_row(part.attack, *cells)
    return table


def _strength(record: Record) -> Iterable[str]:
    """Whether the attacks are as strong as they should be."""
    for one in record.calibration:
        if one.calibrated is False:
            yield (
                f"NOT CALIBRATED: {one.attack} reaches {one.reached:.2f} dB on the undefended "
                f"split, and the protocol asks for {one.reference:.2f}; its scores are no measure"
            )
    for gain in record.convergence or []:
        what = ", ".join(f"{key} {old} to {new}" for key, (old, new) in gain.budget.items())
        gains = ", ".join(
            f"{metric.upper()} {value:+.{DIGITS.get(metric, 3)}f}"
            for metric, value in gain.gained.items()
        )
        if not what:
            yield f"{gain.attack}: it has no budget to double"
            continue
        verdict = {True: "converged", False: "NOT CONVERGED", None: "not scored"}[gain.converged]
        yield f"{gain.attack}, {verdict}: {what}; more leakage: {gains}"


def _percent(score: Score) -> str:
    value = f"{100 * (score.value or 0):.1f} %"
    if score.ci_low is None or score.ci_high is None:
        return value
    return f"{value} ({100 * score.ci_low:.1f} to {100 * score.ci_high:.1f})"


def _cost(cost: Cost) -> Iterable[str]:
    yield (
        f"Client: {_flops(cost.client_flops)} per image "
        f"(undefended {_flops(cost.undefended_client_flops)}), "
        f"{cost.client_parameters:,} parameters"
    )
    if measured := ", ".join(_measured(cost)):
        yield f"  {measured}"
    sizes = cost.values_per_server
    each = f"{sizes[0]:,}" if len(set(sizes)) == 1 else "/".join(f"{size:,}" for size in sizes)
    yield (
        f"On the wire: {cost.bytes_up:,} bytes up and {cost.bytes_down:,} down per image; "
        f"each of {len(sizes)} server{'s'[: len(sizes) > 1]} gets {each} values "
        f"(an image has {cost.image_values:,})"
    )


def _measured(cost: Cost) -> Iterable[str]:
    """What depends on the machine, or is not known of older records."""
    if cost.peak_activation_bytes is not None:
        yield f"{cost.peak_activation_bytes / 1000:,.1f} kB of activations at most"
    ratio = cost.latency_ratio
    if ratio is not None and ratio.value is not None:
        between = f" ({ratio.ci_low:.2f} to {ratio.ci_high:.2f})" if ratio.ci_low else ""
        yield f"{ratio.value:.2f}{between} times the undefended client's time"
    if cost.training_seconds is not None:
        yield f"trained in {cost.training_seconds:,.0f} s"


def _flops(count: int) -> str:
    for scale, unit in ((1e9, "GFLOPs"), (1e6, "MFLOPs"), (1e3, "kFLOPs")):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} FLOPs"


def _adversary(adversary: AdversaryFacts, cost: Cost | None) -> Iterable[str]:
    servers = len(cost.values_per_server) if cost else None
    if servers == 1:
        reads = "the only server"
    elif servers == len(adversary.corrupted):
        reads = f"all {servers} servers"
    else:
        reads = f"server {' and '.join(map(str, adversary.corrupted))}"
        reads += f" (of servers 0 to {servers - 1})" if servers else ""
    times = adversary.transmissions
    repeated = f", sees each image sent {times} times" if times > 1 else ""
    images = {
        "training": "; its own images are the training images themselves",
        "other": "; its own images are of another dataset",
    }.get(adversary.auxiliary, "")
    if len(adversary.coalitions) > 1:
        each = " or ".join("+".join(map(str, one)) for one in adversary.coalitions)
        reads = f"in turn the servers {each}, and the worst of these counts for each image"
    yield f"Adversary: {adversary.knowledge}, reads {reads}{repeated}{images}"
    if adversary.broken:
        yield f"  {adversary.broken} of the attacked images came with values that are no numbers"
    if adversary.screening:
        errors = ", ".join(f"{name}: {error:.4f}" for name, error in adversary.screening.items())
        worst = min(adversary.screening, key=adversary.screening.__getitem__)
        chosen = "chosen as the worst:"
        if adversary.coalitions:
            chosen = f"by the screening {worst} is the worst:"
        yield (
            f"  {chosen} a linear decoder rebuilds the attacker's own validation images "
            f"with the least error from it (MSE {errors})"
        )
