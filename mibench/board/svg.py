"""The geometry of the plots; the templates draw it as plain SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from mibench.board import words
from mibench.board.model import Row, Section
from mibench.job import UNDEFENDED
from mibench.record import Record, Score

WIDTH, HEIGHT = 470, 370
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 14, 42
LETTER = 6.0
"""Width of a letter of a label, about; labels are placed by it."""
LINE = 12
"""Height of a label."""
GAP = 4
"""Room between a mark and its label; another mark stands at least as far off."""
LONGEST = 26
"""Letters of a label; the tooltip has all of it."""
UNIT = 5.0
"""Radius of a mark whose client does as much work as the undefended one; area goes with work."""
LEAST, LARGEST = 3.5, 20.0
"""Radii outside which no mark is drawn."""
SIZES = (1, 4, 16)
"""Multiples of the undefended client's work that the legend shows."""
NOISE = "noise"
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "plus")


@dataclass(frozen=True)
class Tick:
    """A line of the grid: where it is, in the plot's units, and what it says."""

    at: str
    text: str


@dataclass(frozen=True)
class Level:
    """A line with a meaning: its y, what it says, and where that begins or ends."""

    y: float
    text: str
    x: float
    anchor: str


@dataclass(frozen=True)
class Mark:
    """One point.

    Attributes:
        x: from the left.
        y: from the top.
        r: radius.
        path: outline of its shape; empty for a circle.
        style: words for the style sheet.
        low: y of the upper and lower end of its interval; both None without one.
        high: see ``low``.
        label: short name; empty where there was no room.
        label_x: where the label begins or ends.
        label_y: its base line.
        anchor: ``start``, ``middle`` or ``end``.
        lines: what is told on hover, line by line.
        href: page that it leads to; empty for none.
    """

    x: float
    y: float
    r: float
    path: str
    style: str
    low: float | None
    high: float | None
    label: str
    label_x: float
    label_y: float
    anchor: str
    lines: tuple[str, ...]
    href: str = ""


@dataclass(frozen=True)
class Line:
    """A line through points, as SVG writes them, with words for the style sheet."""

    points: str
    style: str


@dataclass(frozen=True)
class Plot:
    """All that a template needs to draw.

    Attributes:
        title: what it shows, for those who do not see it.
        across: name of the horizontal axis.
        up: name of the vertical axis.
        x_ticks: lines of the grid.
        y_ticks: lines of the grid.
        levels: lines with a meaning.
        lines: curves, behind the marks.
        marks: the points, large ones first so that none hides another.
        legend: shape and name of each series.
    """

    title: str
    across: str
    up: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    levels: tuple[Level, ...] = ()
    lines: tuple[Line, ...] = ()
    marks: tuple[Mark, ...] = ()
    legend: tuple[tuple[str, str], ...] = ()


def coordinate(value: float) -> str:
    """A coordinate as it is written: one decimal, always the same digits."""
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self, wanted: int = 6, factor: float = 1.0, digits: int = 0) -> tuple[Tick, ...]:
        step = nice_step((self.high - self.low) / wanted)
        first = math.ceil(round(self.low / step, 6))
        last = math.floor(round(self.high / step, 6))
        decimals = max(digits, -math.floor(math.log10(step * factor) + 1e-9))
        return tuple(
            Tick(coordinate(self.at(n * step)), words.number(n * step * factor, max(0, decimals)))
            for n in range(first, last + 1)
        )


def nice_step(least: float) -> float:
    """The least of 1, 2, 5, 10, 20, ... and their decimal parts that is not below ``least``."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least * (1 - 1e-9))


def _across(values: Iterable[float]) -> _Axis:
    found = list(values)
    low, high = min(found), max(found)
    room = 0.06 * (high - low) or 0.02
    return _Axis(low - room, high + room, LEFT, WIDTH - RIGHT)


def _up(values: Iterable[float]) -> _Axis:
    """Leakage and SSIM live between 0 and 1: that much is always in sight."""
    found = list(values)
    low, high = min([0.0, *found]), max([1.0, *found])
    room = 0.05 * (high - low)
    return _Axis(low - room, high + room, HEIGHT - BOTTOM, TOP)


def tradeoff(section: Section, metric: str, named: str) -> Plot | None:
    """Accuracy against normalised leakage, one mark a row; its area is the client's work.

    Args:
        section: whose rows.
        metric: of the leakage.
        named: what the metric is called on the axis.

    Returns:
        None where fewer than two rows have a value: one alone trades nothing.
    """
    shown = [
        row
        for row in section.rows
        if _leakage(row, metric).value is not None and not math.isnan(row.accuracy)
    ]
    if len(shown) < 2:
        return None
    curve = [
        (accuracy, score)
        for accuracy, score in section.noise.get(metric, ())
        if score.value is not None
    ]
    scores = [_leakage(row, metric) for row in shown]
    across = _across([row.accuracy for row in shown] + [accuracy for accuracy, _ in curve])
    up = _up(_ends(scores + [score for _, score in curve]))
    lines: list[Line] = []
    drawn: list[Sequence[tuple[float, float]]] = []
    if len(curve) > 1:
        points = [(across.at(accuracy), up.at(score.value or 0.0)) for accuracy, score in curve]
        lines.append(Line(_points(points), "noise"))
        drawn.append(points)
    front = sorted(
        (across.at(row.accuracy), up.at(_leakage(row, metric).value or 0.0))
        for row in shown
        if row.pareto
    )
    # The front is of both leakages together. In one of them alone it need not be an edge.
    if len(front) > 1 and not _passed(shown, metric):
        steps = list(_steps(front))
        lines.append(Line(_points(steps), "front"))
        drawn.append(steps)
    # Nobody is both accurate and blind to the image, so that the lower right is free.
    levels = (
        Level(up.at(0.0), "blind guess", WIDTH - RIGHT - 4, "end"),
        Level(up.at(1.0), "no defense", LEFT + 4, "start"),
    )
    drawn += [[(LEFT, one.y), (WIDTH - RIGHT, one.y)] for one in levels]
    written = [_text(one.text, one.x, one.y - 4, one.anchor) for one in levels]
    marks = [_row_mark(row, _leakage(row, metric), named, across, up) for row in shown]
    order = sorted(range(len(marks)), key=lambda at: _importance(shown[at], at))
    return Plot(
        title=f"Accuracy against normalised leakage ({named})",
        across="accuracy, %",
        up=f"leakage ({named})",
        x_ticks=across.ticks(factor=100),
        y_ticks=up.ticks(digits=1),
        levels=levels,
        lines=tuple(lines),
        marks=tuple(
            sorted(_labelled([marks[at] for at in order], drawn, written), key=lambda mark: -mark.r)
        ),
    )


def _passed(shown: Sequence[Row], metric: str) -> bool:
    """Whether a row leaks less than one of the front that is no more accurate than it."""
    at = [(row.pareto, row.accuracy, _leakage(row, metric).value or 0.0) for row in shown]
    return any(
        accuracy >= front_accuracy and leak < front_leak
        for on_front, front_accuracy, front_leak in at
        if on_front
        for _, accuracy, leak in at
    )


def _importance(row: Row, at: int) -> tuple[bool, bool, bool, int]:
    """Who is labelled first: the front, then what is ranked, noise last."""
    return (not row.pareto, not row.ranked, _name(row) == NOISE, at)


def _leakage(row: Row, metric: str) -> Score:
    return row.leakage.get(metric) or _nothing(metric)


def _nothing(metric: str) -> Score:
    return Score(
        metric=metric, version=1, unit="", higher_is_better=True, value=None, ci_low=None,
        ci_high=None, n=0, reason="it was not scored",
    )  # fmt: skip


def _name(row: Row) -> str:
    return row.headline[0].record.defense.name


def _row_mark(row: Row, score: Score, named: str, across: _Axis, up: _Axis) -> Mark:
    cost = row.headline[0].record.cost
    work = words.ratio(cost) if cost else 1.0
    radius = round(min(max(UNIT * math.sqrt(work), LEAST), LARGEST), 1)
    entry = row.headline[0].entry
    name = _name(row)
    if name == UNDEFENDED:
        shape = "square"
    elif name == NOISE:
        shape, radius = "cross", LEAST
    else:
        shape = "triangle" if entry.origin.kind == "submission" else "circle"
    style = [shape, "ranked" if row.ranked else "unranked"]
    style += ["pareto"] * row.pareto + ["warned"] * bool(row.advisories or row.superseded_by)
    lines = [
        row.label,
        f"accuracy {words.percent(row.accuracy)}",
        f"leakage ({named}) {_with_interval(score)}",
    ]
    if cost:
        lines.append(f"client {words.flops(cost.client_flops)}, {words.times(work)} undefended")
    lines.append(_place(row))
    x, y = across.at(row.accuracy), up.at(score.value or 0.0)
    return Mark(
        x=x, y=y, r=radius, path=outline(shape, x, y, radius), style=" ".join(style),
        low=None if score.ci_low is None else up.at(score.ci_low),
        high=None if score.ci_high is None else up.at(score.ci_high),
        label=_shortened(row.label), label_x=0, label_y=0, anchor="start",
        lines=tuple(lines), href=row.slug,
    )  # fmt: skip


def _place(row: Row) -> str:
    if row.rank is None:
        return "not ranked"
    best, worst = row.rank
    return f"rank {best}" if best == worst else f"rank {best} to {worst}"


def _with_interval(score: Score) -> str:
    between = words.interval(score)
    return words.of(score) + (f" ({between})" if between else "")


def _shortened(label: str) -> str:
    return label if len(label) <= LONGEST else f"{label[: LONGEST - 1].rstrip(' ,(')}…"


def outline(shape: str, x: float, y: float, r: float) -> str:
    """Path of a mark of about the area of a circle with radius ``r``; empty for a circle."""
    if shape == "circle":
        return ""
    if shape in ("cross", "plus"):
        a = round(r if shape == "cross" else 1.3 * r, 1)
        ends = ((-a, -a, a, a), (-a, a, a, -a)) if shape == "cross" else (
            (-a, 0, a, 0), (0, -a, 0, a)
        )  # fmt: skip
        return " ".join(
            f"M{coordinate(x + x1)} {coordinate(y + y1)}L{coordinate(x + x2)} {coordinate(y + y2)}"
            for x1, y1, x2, y2 in ends
        )
    corners = {
        "square": [(-0.89, -0.89), (0.89, -0.89), (0.89, 0.89), (-0.89, 0.89)],
        "triangle": [(0.0, -1.45), (1.3, 0.8), (-1.3, 0.8)],
        "diamond": [(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)],
    }[shape]
    points = [f"{coordinate(x + r * dx)} {coordinate(y + r * dy)}" for dx, dy in corners]
    return f"M{'L'.join(points)}Z"


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{coordinate(x)},{coordinate(y)}" for x, y in points)


def _steps(front: Sequence[tuple[float, float]]) -> Iterable[tuple[float, float]]:
    """The edge of what is reached: more accuracy costs the leakage of the next point at once."""
    yield front[0]
    for (x, _), (next_x, next_y) in itertools.pairwise(front):
        yield x, next_y
        yield next_x, next_y


def _ends(scores: Iterable[Score]) -> list[float]:
    found = [(one.value, one.ci_low, one.ci_high) for one in scores]
    return [value for value in itertools.chain(*found) if value is not None]


# --- labels --------------------------------------------------------------------------------------

_Box = tuple[float, float, float, float]


def _labelled(
    marks: Sequence[Mark],
    drawn: Iterable[Sequence[tuple[float, float]]],
    written: Sequence[_Box] = (),
) -> list[Mark]:
    """Gives each mark's label a place, in order.

    One that would cover another, or stand as near to another mark as to its own, gets none.

    Args:
        marks: whose labels.
        drawn: corners of lines that labels avoid where they can.
        written: where other text stands already.
    """
    lines = [bit for corners in drawn for bit in _along(corners)]
    taken: list[_Box] = [_around(mark) for mark in marks]
    taken += written
    placed = []
    for own, mark in enumerate(marks):
        found = [(place, _text(mark.label, *place)) for place in _places(mark)]
        found.sort(key=lambda one: any(_overlap(one[1], bit) for bit in lines))
        for (x, y, anchor), box in found:
            inside = (
                box[0] >= LEFT and box[2] <= WIDTH and box[1] >= 0 and box[3] <= HEIGHT - BOTTOM
            )
            clear = not any(_overlap(box, one) for at, one in enumerate(taken) if at != own)
            if inside and clear:
                taken.append(box)
                placed.append(
                    replace(mark, label_x=round(x, 1), label_y=round(y, 1), anchor=anchor)
                )
                break
        else:
            placed.append(replace(mark, label=""))
    return placed


def _around(mark: Mark) -> _Box:
    far = mark.r + GAP
    return mark.x - far, mark.y - far, mark.x + far, mark.y + far


def _text(text: str, x: float, y: float, anchor: str) -> _Box:
    width = LETTER * len(text)
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return left, y - LINE + 3, left + width, y + 2


def _along(corners: Sequence[tuple[float, float]]) -> Iterable[_Box]:
    """A line as a row of small boxes."""
    for (x, y), (next_x, next_y) in itertools.pairwise(corners):
        count = max(1, int(math.hypot(next_x - x, next_y - y) / 6))
        for step in range(count + 1):
            at_x, at_y = x + (next_x - x) * step / count, y + (next_y - y) * step / count
            yield at_x - 1, at_y - 1, at_x + 1, at_y + 1


def _places(mark: Mark) -> Iterable[tuple[float, float, str]]:
    x, y, r = mark.x, mark.y, mark.r
    yield x + r + GAP, y + 4, "start"
    yield x - r - GAP, y + 4, "end"
    yield x, y - r - 5, "middle"
    yield x, y + r + LINE, "middle"
    for up in (-r - 2, r + LINE - 2):
        yield x + r, y + up, "start"
        yield x - r, y + up, "end"


def _overlap(one: _Box, other: _Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


# --- coalitions ----------------------------------------------------------------------------------


def curves(
    series: Mapping[str, Sequence[tuple[str, Score]]], title: str, across: str, up: str
) -> Plot | None:
    """Lines over named places, such as coalitions, each with its own shape.

    Args:
        series: by name, places with values; places come in the order of the first series.
        title: what is shown.
        across: name of the horizontal axis.
        up: name of the vertical axis.

    Returns:
        None where fewer than two places have a value.
    """
    known = {
        name: [(place, one) for place, one in points if one.value is not None]
        for name, points in series.items()
    }
    places = list(dict.fromkeys(place for points in known.values() for place, _ in points))
    if len(places) < 2:
        return None
    axis = _Axis(-0.4, len(places) - 0.6, LEFT, WIDTH - RIGHT)
    height = _up(_ends(one for points in known.values() for _, one in points))
    lines, marks, legend = [], [], []
    for at, (name, points) in enumerate(known.items()):
        shape = SHAPES[at % len(SHAPES)]
        style = f"series{at % len(SHAPES)}"
        spots = [(axis.at(places.index(place)), height.at(one.value or 0)) for place, one in points]
        lines.append(Line(_points(spots), f"curve {style}"))
        legend.append((shape, name))
        for (x, y), (place, one) in zip(spots, points, strict=True):
            marks.append(
                Mark(
                    x=x, y=y, r=4.0, path=outline(shape, x, y, 4.0), style=f"{shape} {style}",
                    low=None if one.ci_low is None else height.at(one.ci_low),
                    high=None if one.ci_high is None else height.at(one.ci_high),
                    label="", label_x=0, label_y=0, anchor="start",
                    lines=(name, f"{across}: {place}", f"{up} {_with_interval(one)}"),
                )
            )  # fmt: skip
    return Plot(
        title=title, across=across, up=up,
        x_ticks=tuple(Tick(coordinate(axis.at(n)), place) for n, place in enumerate(places)),
        y_ticks=height.ticks(digits=1),
        lines=tuple(lines), marks=tuple(marks), legend=tuple(legend),
    )  # fmt: skip


def coalitions(record: Record, metric: str, named: str) -> Plot | None:
    """What each attack got from each coalition of a run that attacked several.

    The coalition that gave the worst attack most comes first.
    """
    series: dict[str, list[tuple[str, Score]]] = {}
    for part in record.suite:
        score = words.found(part.scores, metric)
        if score is None or score.value is None or not part.corrupted:
            continue
        place = "+".join(map(str, part.corrupted))
        series.setdefault(part.attack.partition("@")[0], []).append((place, score))
    places = {place for points in series.values() for place, _ in points}
    if len(places) < 2:
        return None
    sign = -1 if all(one.higher_is_better for p in series.values() for _, one in p) else 1
    reach = {
        place: min(sign * (s.value or 0) for p in series.values() for at, s in p if at == place)
        for place in places
    }
    ordered = {
        name: sorted(points, key=lambda point: (reach[point[0]], point[0]))
        for name, points in series.items()
    }
    title = f"{named} of each attack by the coalition that it reads"
    return curves(ordered, title, "servers read", named)


def by_size(rows: Sequence[Row], metric: str, named: str) -> Plot | None:
    """Leakage of one defense against the number of servers that the attacker reads.

    Args:
        rows: of the same defense, under protocols that differ in the size of the coalition.
        metric: of the leakage.
        named: what the metric is called.
    """
    points: dict[int, Score] = {}
    for row in rows:
        facts = row.headline[0].record.adversary
        score = _leakage(row, metric)
        if facts is not None and score.value is not None:
            known = points.get(len(facts.corrupted))
            if known is None or (known.value or 0) < score.value:
                points[len(facts.corrupted)] = score
    series = {"worst attack": [(str(size), points[size]) for size in sorted(points)]}
    title = f"Leakage ({named}) by the number of servers read"
    return curves(series, title, "number of servers read", f"leakage ({named})")
