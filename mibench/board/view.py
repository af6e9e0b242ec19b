"""What the pages say of a row: its cells in the table, and the parts of its own page."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from pydantic import JsonValue

from mibench.board import words
from mibench.board.model import BestKnown, Board, CheckLine, Level, Listed, Row
from mibench.files import canonical_json
from mibench.params import parse_yaml
from mibench.record import Component, Record, Score

NAMES = {
    "ssim": "SSIM", "psnr": "PSNR", "lpips": "LPIPS", "mse": "MSE", "reid-top1": "found",
    "reid-top5": "found in 5", "reid-mrr": "reciprocal rank", "recognition": "recognised",
}  # fmt: skip
"""What metrics are called on the pages."""
YES_OR_NO = {"recognition", "reid-top1", "reid-top5"}
"""Metrics that an image meets or not."""
UNSCORED = "not scored under this protocol"
UNKNOWN = "the record has no accuracy"


@dataclass(frozen=True)
class Cell:
    """One cell of the table.

    Attributes:
        text: what stands there, or a dash.
        note: smaller, below: an interval.
        why: why there is a dash, or whose the ``more`` is; told on hover and on the row's page.
        value: what the column is sorted by: a number for the script, or words; empty for none.
        more: below the note, a second value.
    """

    text: str
    note: str = ""
    why: str = ""
    value: str = ""
    more: str = ""


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        key: its name in the page's address.
        head: its heading.
        group: heading over several columns; empty for none.
        help: what it holds, in a sentence or two.
        cell: makes its cell of a row.
        descending: whether the first click sorts from the largest.
        text: whether it is sorted as words.
    """

    key: str
    head: str
    group: str
    help: str
    cell: Callable[[Row], Cell]
    descending: bool = False
    text: bool = False


def score_cell(score: Score | None, why: str = UNSCORED, decimals: int | None = None) -> Cell:
    """A score with its interval; a dash with the reason where it has no value."""
    if score is None:
        return Cell(words.DASH, why=why)
    if score.value is None:
        return Cell(words.DASH, why=score.reason or why)
    return Cell(
        words.of(score, decimals),
        words.interval(score, decimals),
        value=words.sortable(score.value),
    )


def _rank(row: Row) -> Cell:
    if row.rank is None:
        return Cell(words.DASH, why=" ".join(row.reasons) or "not ranked")
    best, worst = row.rank
    text = str(best) if best == worst else f"{best}–{worst}"
    return Cell(text, value=words.sortable(best + worst / 1000))


def _accuracy(row: Row) -> Cell:
    note = ""
    if len(row.headline) == 1:
        found = words.found(row.headline[0].record.utility, "accuracy")
        if found is not None and found.ci_low is not None and found.ci_high is not None:
            note = words.between(100 * found.ci_low, 100 * found.ci_high, 1)
    if math.isnan(row.accuracy):
        return Cell(words.DASH, why=UNKNOWN)
    return Cell(words.number(100 * row.accuracy, 1), note, value=words.sortable(row.accuracy))


def _lost(row: Row) -> Cell:
    if math.isnan(row.drop):
        return Cell(words.DASH, why=UNKNOWN)
    return Cell(words.number(row.drop, 1), value=words.sortable(row.drop))


def _scored(metric: str) -> Callable[[Row], Cell]:
    return lambda row: score_cell(row.scores.get(metric))


def _leaked(metric: str) -> Callable[[Row], Cell]:
    def cell(row: Row) -> Cell:
        made = score_cell(row.leakage.get(metric), decimals=words.SHARE)
        best = (row.best_known or {}).get(metric)
        known = words.found(best.leakage, metric) if best else None
        if best is None or known is None or known.value is None:
            return made
        why = f"{words.of(known)}: best known attack, by {best.by}"
        return replace(made, why=why, more=f"known {words.of(known)}")

    return cell


def _gained(metric: str) -> Callable[[Row], Cell]:
    why = "no noise of this accuracy was measured by this attack"
    return lambda row: score_cell(row.gain.get(metric), why)


def _work(row: Row) -> Cell:
    cost = row.headline[0].record.cost
    if cost is None:
        return Cell(words.DASH, why="the record has no cost")
    ratio = words.ratio(cost)
    return Cell(words.times(ratio), words.flops(cost.client_flops), value=words.sortable(ratio))


def _sent(row: Row) -> Cell:
    cost = row.headline[0].record.cost
    if cost is None:
        return Cell(words.DASH, why="the record has no cost")
    return Cell(words.size(cost.bytes_up), value=words.sortable(cost.bytes_up))


def _seeds(row: Row) -> Cell:
    count = len(row.headline)
    return Cell(str(count), value=words.sortable(count))


COLUMNS = (
    Column("rank", "Rank", "", "Place by the larger leakage among the ranked rows of a protocol. "
           "A range where intervals overlap: the places that they allow.", _rank),
    Column("defense", "Defense", "", "Name, and the parameters that differ from its defaults. "
           "Leads to its page.", lambda row: Cell(row.label, value=row.label), text=True),
    Column("badge", "Badge", "", "How far the row was verified: claimed, rescored or reproduced.",
           lambda row: Cell(row.level, value=str(list(Level).index(row.level))), descending=True),
    Column("accuracy", "Accuracy", "Task, %", "Share of private images that are classified "
           "rightly, with the defense on. Below it the 95 % interval.", _accuracy,
           descending=True),
    Column("drop", "Lost", "Task, %", "Points of accuracy lost against the undefended model of "
           "the same run. More than 3 take the rank.", _lost),
    Column("ssim", "SSIM", "Worst case over attacks", "Structural similarity of original and "
           "reconstruction, of the worst attack for each image. Higher: more has leaked.",
           _scored("ssim")),
    Column("psnr", "PSNR, dB", "Worst case over attacks", "Peak signal-to-noise ratio. Higher: "
           "more has leaked. A blind guess alone gets 12 to 13 dB on small photographs.",
           _scored("psnr")),
    Column("lpips", "LPIPS", "Worst case over attacks", "Perceptual distance. Lower: more has "
           "leaked.", _scored("lpips"), descending=True),
    Column("reid", "Found", "Worst case over attacks", "reid-top1: share of images that a judge "
           "finds among many others by the reconstruction alone. Higher: more has leaked.",
           _scored("reid-top1")),
    Column("leak-ssim", "SSIM", "Leakage", "Normalised: 0 is the best blind guess, 1 the same "
           "attack on the undefended split.", _leaked("ssim")),
    Column("leak-reid", "Found", "Leakage", "The same of the share of images that are found.",
           _leaked("reid-top1")),
    Column("gain-ssim", "SSIM", "Gain over noise", "Leakage of Gaussian noise at the same "
           "accuracy, less the row's own under the attack of the noise curve. Not above 0: no "
           "better than noise.", _gained("ssim"), descending=True),
    Column("gain-reid", "Found", "Gain over noise", "The same of the share of images that are "
           "found.", _gained("reid-top1"), descending=True),
    Column("flops", "FLOPs", "Client", "Work of the client per image, as a multiple of the "
           "undefended client's.", _work),
    Column("bytes", "Sent", "Client", "Bytes that the client sends per image, all shares "
           "together.", _sent),
    Column("seeds", "Seeds", "", "Trainings behind the row, each with its own seed.", _seeds,
           descending=True),
    Column("attack", "Attack", "", "suite: all attacks of the protocol, and the worst of them for "
           "each image. Else the one attack that was made.",
           lambda row: Cell(row.attack, value=row.attack), text=True),
)  # fmt: skip
"""The columns of a table, from the left; `remarks` stand behind them."""


def groups() -> list[tuple[str, int]]:
    """The headings above the columns, each with the number of columns that it spans."""
    found: list[tuple[str, int]] = []
    for column in COLUMNS:
        if found and column.group and found[-1][0] == column.group:
            found[-1] = (column.group, found[-1][1] + 1)
        else:
            found.append((column.group, 1))
    return found


def adversary(row: Row) -> str:
    """Who attacked, in words."""
    record = row.headline[0].record
    return words.adversary(record.adversary, record.cost) if record.adversary else "not recorded"


# --- the row's own page --------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A line of a small table: its name, its cells."""

    name: str
    cells: tuple[Cell, ...]
    note: str = ""


def scores_table(row: Row) -> list[Line]:
    """The scores of the first seed between their controls, by metric."""
    record = row.headline[0].record
    lines = []
    for score in record.scores:
        name = score.metric
        own = row.scores.get(name, score)
        cells = [
            score_cell(words.found(record.prior_only, name)),
            score_cell(words.found(record.permuted, name)),
            score_cell(own),
            score_cell(words.found(record.undefended, name)),
            score_cell(
                row.leakage.get(name) or words.found(record.leakage, name), decimals=words.SHARE
            ),
            *(_plain(value, name, score.reason) for value in (score.p50, score.p95, score.worst)),
        ]
        way = "higher leaks more" if score.higher_is_better else "lower leaks more"
        unit = f", {score.unit}" if score.unit else ""
        lines.append(Line(f"{NAMES.get(name, name)}{unit}", tuple(cells), way))
    return lines


def _plain(value: float | None, metric: str, reason: str | None) -> Cell:
    if metric in YES_OR_NO:
        return Cell(
            words.DASH, why="of each image it is 0 or 1, so that only the mean says something"
        )
    if value is None:
        return Cell(words.DASH, why=reason or "not recorded")
    return Cell(words.number(value, words.digits(metric)))


def seeds_table(row: Row) -> list[Line]:
    """One line for each seed behind the headline; empty where there is one."""
    if len(row.headline) < 2:
        return []
    lines = []
    for one in row.headline:
        record = one.record
        accuracy = words.found(record.utility, "accuracy")
        right = None if accuracy is None else accuracy.value
        first = Cell(words.DASH) if right is None else Cell(words.percent(right))
        scored = [score_cell(words.found(record.scores, m)) for m in SHOWN]
        leaked = [score_cell(words.found(record.leakage, m)) for m in ("ssim", "reid-top1")]
        lines.append(Line(str(record.seed), (first, *scored, *leaked)))
    return lines


SHOWN = ("ssim", "psnr", "lpips", "reid-top1")
"""Metrics of small tables."""


def attacks_table(record: Record) -> list[Line]:
    """What each attack did alone, the most harmful first; those that did not apply below."""
    lines = []
    for part in sorted(record.suite, key=lambda part: -part.share_of_worst.get("ssim", -1.0)):
        if not part.scores:
            lines.append(Line(part.attack, (), part.reason or "left out"))
            continue
        cells = [score_cell(words.found(part.scores, metric)) for metric in SHOWN]
        share = part.share_of_worst.get("ssim")
        cells.append(Cell(words.DASH) if share is None else Cell(words.percent(share)))
        seconds = part.seconds_per_image
        cells.append(Cell(words.DASH) if seconds is None else Cell(f"{seconds:.2g} s"))
        lines.append(Line(part.attack, tuple(cells)))
    return lines


def strength(record: Record) -> list[str]:
    """Whether the attacks were as strong as they should be, one sentence each."""
    told = []
    for one in record.calibration:
        reached = f"{words.number(one.reached, 1)} dB on the undefended split"
        if one.reference is None or one.calibrated is None:
            told.append(f"{one.attack}: {reached}; the protocol has no reference")
        else:
            verdict = "calibrated" if one.calibrated else "NOT CALIBRATED"
            asked = words.number(one.reference, 1)
            told.append(f"{one.attack}: {verdict}, {reached}, asked for {asked}")
    for gain in record.convergence or []:
        if gain.budget:
            came = {True: "converged", False: "NOT CONVERGED", None: "not scored"}
            told.append(f"{gain.attack}: {came[gain.converged]} with twice its budget")
    return told


def information_table(record: Record) -> list[Line]:
    """What the shares tell, whatever the attack, beside the undefended split."""
    return [
        Line(
            f"{score.metric}{f', {score.unit}' if score.unit else ''}",
            (
                score_cell(score),
                score_cell(words.found(record.information_undefended, score.metric)),
            ),
        )
        for score in record.information
    ]


def cost_table(record: Record) -> list[tuple[str, str]]:
    """What the defense costs, in words."""
    cost = record.cost
    if cost is None:
        return []
    bare = words.flops(cost.undefended_client_flops)
    each = " or ".join(f"{count:,}" for count in sorted(set(cost.values_per_server)))
    servers = f"{len(cost.values_per_server)}, each with {each} values of a message; "
    servers += f"an image has {cost.image_values:,}"
    told = [
        ("client work per image", f"{words.flops(cost.client_flops)}, undefended {bare}"),
        ("client parameters", words.number(cost.client_parameters, 0)),
        ("sent per image", f"{words.size(cost.bytes_up)} up, {words.size(cost.bytes_down)} down"),
        ("servers", servers),
    ]
    if cost.peak_activation_bytes is not None:
        told.append(("client memory for activations", words.size(cost.peak_activation_bytes)))
    ratio = cost.latency_ratio
    if ratio is not None and ratio.value is not None:
        between = words.interval(ratio)
        told.append(
            ("client time", f"{words.times(ratio.value)} the undefended client's"
             + (f" ({between})" if between else "")),
        )  # fmt: skip
    if cost.training_seconds is not None:
        told.append(("training", f"{words.number(cost.training_seconds, 0)} s"))
    return told


def provenance(record: Record) -> list[tuple[str, str]]:
    """Where and with what a record was made."""
    facts = record.provenance
    told = [("started", record.started)]
    if record.wall_seconds is not None:
        told.append(("took", f"{words.number(record.wall_seconds, 0)} s"))
    told += [
        (key, str(facts[key])) for key in ("mibench", "python", "system", "device") if key in facts
    ]
    revision = facts.get("revision")
    if isinstance(revision, dict):
        state = " with changes that were not committed" if revision.get("dirty") else ""
        told.append(("commit", f"{revision.get('commit')}{state}"))
    packages = facts.get("packages")
    if isinstance(packages, dict):
        told.append(("packages", ", ".join(f"{k} {v}" for k, v in sorted(packages.items()))))
    return told


def tally(checks: Sequence[CheckLine]) -> str:
    """How many checks had which verdict, such as ``13 passed, 9 skipped``."""
    verdicts = [one.verdict for one in checks]
    order = sorted(set(verdicts), key=lambda one: (one != "passed", one != "skipped", one))
    return ", ".join(f"{verdicts.count(one)} {one}" for one in order)


def commands(one: Listed, version: str) -> list[tuple[str, str]]:
    """Commands that run a record again: exactly, and from scratch where nothing departs."""
    record = one.record
    told = [
        ("the record itself, with a verdict",
         shlex.join(["mibench", "reproduce", f"leaderboard/{version}/records/{one.id}"])),
    ]  # fmt: skip
    if record.deviations:
        return told
    run = ["mibench", "run", "--defense", _called(record.defense)]
    run += ["--attack", _called(record.attack), "--protocol", record.protocol.id]
    for name, value in sorted(record.defense.params.items()):
        run += ["--set", f"defense.{name}={_setting(value)}"]
    run += ["--seed", str(record.seed)]
    return [*told, ("the same run, spelled out", shlex.join(run))]


def _called(component: Component) -> str:
    return component.location or component.name


_BARE = re.compile(r"[A-Za-z_][\w./-]*")


def _setting(value: JsonValue) -> str:
    """A value as ``--set`` reads it: YAML, in which a plain word needs no quotes."""
    plain = isinstance(value, str) and _BARE.fullmatch(value) and parse_yaml(value, "") == value
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


def same_defense(board: Board, row: Row) -> list[Row]:
    """Rows of the same defense with the same parameters, under protocols of the same name."""

    def named(other: Row) -> tuple[str, str, bytes]:
        record = other.headline[0].record
        own = record.defense
        return record.protocol.id, own.name, canonical_json(own.params)

    return [
        other for section in board.sections for other in section.rows if named(other) == named(row)
    ]


def successors(board: Board) -> dict[str, Row]:
    """By record id, the row that it is part of."""
    return {
        one.id: row
        for section in board.sections
        for row in section.rows
        for one in (*row.headline, *row.others)
    }


def best_known(row: Row) -> list[tuple[str, BestKnown, Cell, Cell]]:
    """Submitted attacks that leak more than the headline: metric, attack, score, leakage."""
    return [
        (
            NAMES.get(metric, metric),
            best,
            score_cell(words.found(best.scores, metric)),
            score_cell(words.found(best.leakage, metric)),
        )
        for metric, best in sorted((row.best_known or {}).items())
    ]


def distinct(values: Iterable[str]) -> Sequence[str]:
    """Each value once, in order."""
    return sorted(set(values))
