"""The geometry of the plots."""

import itertools
from dataclasses import replace

import pytest
from board_pages import small_board
from hypothesis import given
from hypothesis import strategies as st

from mibench.board import svg
from mibench.record import Score, SuitePart


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    return small_board(tmp_path_factory.mktemp("svg"))[1].sections[0]


def score(value, low=None, high=None, metric="ssim"):
    return Score(
        metric=metric, version=1, unit="", higher_is_better=True, value=value, ci_low=low,
        ci_high=high, n=8, reason=None if value is not None else "nobody knows",
    )  # fmt: skip


def by_row(plot):
    return {mark.href: mark for mark in plot.marks}


def test_marks_stand_where_their_numbers_say(section):
    plot = svg.tradeoff(section, "ssim", "SSIM")
    marks = by_row(plot)
    assert set(marks) == {row.slug for row in section.rows}
    for one, other in itertools.combinations(section.rows, 2):
        a, b = marks[one.slug], marks[other.slug]
        assert (a.x < b.x) == (one.accuracy < other.accuracy)
        # from the top: what leaks more stands higher
        assert (a.y < b.y) == (one.leakage["ssim"].value > other.leakage["ssim"].value)
    for mark in plot.marks:
        assert svg.LEFT <= mark.x <= svg.WIDTH - svg.RIGHT
        assert svg.TOP <= mark.high <= mark.y <= mark.low <= svg.HEIGHT - svg.BOTTOM


def test_the_area_of_a_mark_is_the_work_of_its_client(section):
    cost = section.rows[0].headline[0].record.cost
    radii = []
    for times in (1, 4):
        more = cost.model_copy(update={"client_flops": times * cost.undefended_client_flops})
        record = section.rows[0].headline[0].record
        own = record.model_copy(
            update={"cost": more, "defense": record.defense.model_copy(update={"name": "mine"})}
        )
        listed = replace(section.rows[0].headline[0], record=own)
        row = replace(section.rows[0], headline=(listed,))
        plot = svg.tradeoff(replace(section, rows=(row, *section.rows[1:])), "ssim", "SSIM")
        radii.append(by_row(plot)[row.slug].r)
    assert radii[1] == pytest.approx(2 * radii[0])


def test_noise_is_a_line_and_rows_have_shapes(section):
    plot = svg.tradeoff(section, "ssim", "SSIM")
    noise = next(line for line in plot.lines if line.style == "noise")
    assert len(noise.points.split()) == len(section.noise["ssim"])
    marks = by_row(plot)
    shapes = {
        row.headline[0].record.defense.name: marks[row.slug].style.split()[0]
        for row in section.rows
    }
    assert shapes["none"] == "square"
    assert shapes["noise"] == "cross"
    assert shapes["disco"] == "triangle"  # a submission
    assert shapes["bottleneck"] == "circle"


def test_labels_cover_neither_each_other_nor_the_marks(section):
    many = tuple(
        replace(section.rows[0], slug=f"row-{n}", label=f"defense number {n}",
                accuracy=0.7 + 0.002 * n)
        for n in range(12)
    )  # fmt: skip
    plot = svg.tradeoff(replace(section, rows=many), "ssim", "SSIM")
    named = [mark for mark in plot.marks if mark.label]
    assert 0 < len(named) < len(many)
    boxes = [svg._text(mark.label, mark.label_x, mark.label_y, mark.anchor) for mark in named]
    assert not any(svg._overlap(a, b) for a, b in itertools.combinations(boxes, 2))
    for box, own in zip(boxes, named, strict=True):
        for mark in plot.marks:
            if mark is not own:
                assert not svg._overlap(box, svg._around(mark))
    for level in plot.levels:
        text = svg._text(level.text, level.x, level.y - 4, level.anchor)
        assert not any(svg._overlap(text, box) for box in boxes)


def test_the_front_is_a_line_only_where_nobody_passes_it(section):
    def row(at, accuracy, leak, **changes):
        first = section.rows[0]
        leakage = {name: score(leak, metric=name) for name in first.leakage}
        return replace(first, slug=f"row-{at}", accuracy=accuracy, leakage=leakage, **changes)

    front = (row(0, 0.5, 0.1, pareto=True), row(1, 0.7, 0.6, pareto=True))

    def styles(*others):
        plot = svg.tradeoff(replace(section, rows=(*front, *others)), "ssim", "SSIM")
        return [line.style for line in plot.lines]

    assert "front" in styles(row(2, 0.6, 0.7, pareto=False))
    assert "front" not in styles(row(2, 0.75, 0.5, pareto=False))


def test_the_tooltip_has_the_whole_label_and_the_interval(section):
    long = "x" * 60
    plot = svg.tradeoff(
        replace(section, rows=(replace(section.rows[0], label=long), *section.rows[1:])),
        "ssim", "SSIM",
    )  # fmt: skip
    mark = by_row(plot)[section.rows[0].slug]
    assert mark.lines[0] == long
    assert len(mark.label) <= svg.LONGEST
    assert any("leakage (SSIM)" in line and "–" in line for line in mark.lines)


def test_rows_without_a_value_are_left_out(section):
    first = section.rows[0]
    blank = replace(first, leakage=first.leakage | {"ssim": score(None)})
    unknown = replace(section.rows[1], accuracy=float("nan"))
    rows = (blank, unknown, *section.rows[2:])
    plot = svg.tradeoff(replace(section, rows=rows), "ssim", "SSIM")
    assert set(by_row(plot)) == {row.slug for row in section.rows[2:]}
    assert svg.tradeoff(section, "lpips", "LPIPS") is None


def test_one_row_alone_has_no_plot(section):
    alone = replace(section, rows=section.rows[:1], noise={})
    assert svg.tradeoff(alone, "ssim", "SSIM") is None


@given(st.floats(1e-6, 1e6))
def test_steps_of_the_grid_are_round(least):
    step = svg.nice_step(least)
    assert step >= least * (1 - 1e-8)
    assert step <= 2.51 * least
    assert f"{step:e}"[0] in "125"


@pytest.mark.parametrize("shape", [one for one in svg.SHAPES if one != "circle"])
def test_every_shape_has_an_outline(shape):
    assert svg.outline(shape, 10, 10, 4).startswith("M")


def test_the_edge_of_the_front_goes_up_before_it_goes_on():
    points = list(svg._steps([(10, 90), (20, 50), (40, 20)]))
    assert points == [(10, 90), (10, 50), (20, 50), (20, 20), (40, 20)]


def test_the_front_is_no_line_where_it_is_no_edge(section):
    """It is of both leakages: in one of them a row on it may leak more than a more accurate one."""
    rows = [replace(row, pareto=False) for row in section.rows]
    order = sorted(range(len(rows)), key=lambda at: rows[at].accuracy)
    low, high = order[0], order[-1]
    for value, drawn in ((0.1, True), (1.2, False)):
        rows[low] = replace(rows[low], pareto=True, leakage={"ssim": score(value)})
        rows[high] = replace(rows[high], pareto=True, leakage={"ssim": score(0.9)})
        plot = svg.tradeoff(replace(section, rows=tuple(rows)), "ssim", "SSIM")
        assert any(line.style == "front" for line in plot.lines) is drawn


# --- coalitions ----------------------------------------------------------------------------------


def test_coalitions_come_in_the_order_of_what_they_give(section):
    record = section.rows[0].headline[0].record
    parts = [
        SuitePart(attack=f"{name}@{'+'.join(map(str, who))}", corrupted=who, scores=[score(value)])
        for name, who, value in (
            ("linear", [0, 1], 0.2), ("linear", [0, 2], 0.5), ("linear", [1, 2], 0.3),
            ("decoder", [0, 1], 0.6), ("decoder", [0, 2], 0.1), ("decoder", [1, 2], 0.2),
        )
    ]  # fmt: skip
    plot = svg.coalitions(record.model_copy(update={"suite": parts}), "ssim", "SSIM")
    assert [tick.text for tick in plot.x_ticks] == ["0+1", "0+2", "1+2"]
    assert [name for _, name in plot.legend] == ["linear", "decoder"]
    assert len(plot.lines) == 2
    assert len(plot.marks) == 6


def test_one_coalition_is_no_curve(section):
    assert svg.coalitions(section.rows[0].headline[0].record, "ssim", "SSIM") is None


def test_leakage_grows_with_the_number_of_servers_read(section):
    rows = []
    for servers, value in (([0], 0.2), ([0, 1], 0.5), ([0, 1, 2], 0.9)):
        one = section.rows[0].headline[0]
        who = one.record.adversary.model_copy(update={"corrupted": servers})
        listed = replace(one, record=one.record.model_copy(update={"adversary": who}))
        rows.append(replace(section.rows[0], headline=(listed,), leakage={"ssim": score(value)}))
    plot = svg.by_size(rows, "ssim", "SSIM")
    assert [tick.text for tick in plot.x_ticks] == ["1", "2", "3"]
    heights = [mark.y for mark in sorted(plot.marks, key=lambda mark: mark.x)]
    assert heights == sorted(heights, reverse=True)
    assert svg.by_size(rows[:1], "ssim", "SSIM") is None
