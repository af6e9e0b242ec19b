"""The ranking rule on plain numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mibench.board import rules
from mibench.board.rules import Interval

leaks = st.floats(-0.5, 1.5, allow_nan=False)
intervals = st.tuples(leaks, leaks, leaks).map(lambda ends: Interval(*(sorted(ends)[i] for i in
                                                                       (1, 0, 2))))  # fmt: skip


def test_rows_with_separate_intervals_have_their_own_places():
    rows = [Interval(0.9, 0.8, 1.0), Interval(0.1, 0.0, 0.2), Interval(0.5, 0.4, 0.6)]
    assert rules.places(rows) == [(3, 3), (1, 1), (2, 2)]


def test_rows_are_tied_where_intervals_meet():
    chain = [Interval(0.1, 0.0, 0.3), Interval(0.3, 0.2, 0.5), Interval(0.5, 0.4, 0.6)]
    # The first is surely below the third alone, and the second may stand anywhere.
    assert rules.places(chain) == [(1, 2), (1, 3), (2, 3)]


def test_touching_intervals_are_no_difference():
    assert rules.places([Interval(0.1, 0.0, 0.2), Interval(0.3, 0.2, 0.4)]) == [(1, 2), (1, 2)]


@given(st.lists(intervals, max_size=12))
def test_places_are_possible_and_agree_with_each_other(rows):
    found = rules.places(rows)
    for place, row in zip(found, rows, strict=True):
        assert 1 <= place[0] <= place[1] <= len(rows)
        for other, theirs in zip(found, rows, strict=True):
            if rules.surely_below(row, theirs):
                assert place[0] <= other[0]
                assert place[1] < len(rows) or other[1] == len(rows)
                # The two never tie for one and the same place on both ends.
                assert place != other
    # Whoever has the lowest value can always be first.
    if rows:
        best = min(range(len(rows)), key=lambda at: rows[at].value)
        assert found[best][0] == 1


@given(st.lists(intervals, min_size=1, max_size=8))
def test_order_of_rows_does_not_matter(rows):
    turned = rules.places(rows[::-1])[::-1]
    assert turned == rules.places(rows)


def test_nobody_wins_by_fooling_one_of_two_metrics():
    blurred = rules.larger([Interval(0.05, 0.0, 0.1), Interval(0.9, 0.85, 0.95)])
    honest = rules.larger([Interval(0.4, 0.35, 0.45), Interval(0.4, 0.3, 0.5)])
    assert blurred.value == 0.9
    assert rules.surely_below(honest, blurred)


@given(st.lists(intervals, min_size=1, max_size=3))
def test_the_larger_of_several_lies_in_its_interval(found):
    worst = rules.larger(found)
    assert worst.low <= worst.value <= worst.high
    assert worst.value == max(one.value for one in found)


def test_front_holds_what_nothing_beats():
    points = [(0.75, 1.0), (0.70, 0.5), (0.70, 0.6), (0.60, 0.5), (0.60, 0.1)]
    assert rules.front(points) == [True, True, False, False, True]


def test_equal_points_are_both_on_the_front():
    assert rules.front([(0.7, 0.5), (0.7, 0.5)]) == [True, True]


@given(st.lists(st.tuples(st.floats(0, 1), leaks), min_size=1, max_size=10))
def test_every_point_is_on_the_front_or_beaten_by_one_that_is(points):
    marked = rules.front(points)
    front = [point for point, on in zip(points, marked, strict=True) if on]
    assert front
    for point in points:
        assert any(one[0] >= point[0] and one[1] <= point[1] for one in front)


def test_all_of_128_found_does_not_prove_the_next():
    low, high = rules.all_or_none(1.0, 128)
    assert high == 1.0
    assert low == pytest.approx(0.9709, abs=1e-4)  # Wilson, by hand: 128 / (128 + 3.8415)
    assert rules.all_or_none(0.0, 128) == (0.0, pytest.approx(1 - low))
    with pytest.raises(ValueError, match="0 or 1"):
        rules.all_or_none(0.5, 128)


CURVE = [(0.5, 0.2), (0.7, 0.8), (0.76, 1.0)]


@pytest.mark.parametrize(
    ("accuracy", "leak"), [(0.5, 0.2), (0.6, 0.5), (0.7, 0.8), (0.73, 0.9), (0.76, 1.0), (0.8, 1.0)]
)
def test_noise_is_linear_between_its_points(accuracy, leak):
    assert rules.on_curve(CURVE, accuracy) == pytest.approx(leak)


def test_below_the_last_point_noise_is_not_known():
    assert rules.on_curve(CURVE, 0.49) is None
