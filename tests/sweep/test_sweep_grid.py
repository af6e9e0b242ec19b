"""Grids: what they hold, in which order, and what is wrong with them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mibench.errors import InvalidParamsError
from mibench.params import build
from mibench.sweep.grid import Grid, load_grid, problems

SMOKE = "procedural-smoke-v1"


def grid(**changes):
    values = {"protocols": [SMOKE], "defenses": ["none"], "attacks": ["decoder"], "seeds": [0]}
    return build(Grid, values | changes, "grid")


def keys(given):
    return [cell.key for cell in given.cells()]


def test_the_order_of_the_file_holds_and_first_seeds_come_first():
    found = keys(grid(defenses=["none", "noise"], attacks=["decoder", "linear"], seeds=[3, 1]))
    rows = [f"{d}-{a}" for d in ("none", "noise") for a in ("decoder", "linear")]
    assert found == [f"{SMOKE}/{row}-s{seed}" for seed in (3, 1) for row in rows]


def test_without_seeds_those_of_the_protocol_are_taken():
    assert [cell.job.seed for cell in grid(seeds=None).cells()] == [0]


def test_every_combination_of_each_is_one_run():
    noise = {"name": "dropout", "set": {"rate": 0.5}}
    assert len(grid(defenses=[noise]).cells()) == 1
    swept = {
        "name": "noise",
        "each": {"snr_db": [0.0, -6.0], "training": ["post_hoc", "noise_aware"]},
    }
    found = [dict(cell.job.defense_params) for cell in grid(defenses=[swept]).cells()]
    assert found == [
        {"snr_db": level, "training": training}
        for level in (0.0, -6.0)
        for training in ("post_hoc", "noise_aware")
    ]


def test_a_run_that_stands_twice_is_made_once():
    assert len(keys(grid(defenses=["none", "none", {"name": "none"}]))) == 1


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=6))
def test_runs_have_folders_of_their_own(levels):
    found = keys(grid(defenses=[{"name": "noise", "each": {"snr_db": levels}}]))
    assert len(set(found)) == len(found) == len({repr(level) for level in levels})


def test_words_repeat_what_the_grid_says():
    one = grid(defenses=[{"name": "noise", "set": {"snr_db": -6}}], seeds=[2], converge=True)
    assert one.cells()[0].words() == [
        "--protocol", SMOKE, "--defense", "noise", "--attack", "decoder", "--seed", "2",
        "--set", "defense.snr_db=-6", "--converge",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"defences": ["none"]}, "defences"),
        ({"defenses": []}, "defenses"),
        ({"attacks": "decoder"}, "attacks"),
        ({"seeds": []}, "seeds"),
        ({"defenses": [{"name": "noise", "each": {"snr_db": []}}]}, "empty"),
        ({"defenses": [{"name": "noise", "set": {"a": 1}, "each": {"a": [1]}}]}, "both"),
    ],
)
def test_a_grid_that_is_wrong_is_named(changes, said):
    with pytest.raises(InvalidParamsError, match=said):
        grid(**changes)


@pytest.mark.parametrize("text", ["7", "- a", "a: [", "protocols: 3"])
def test_a_file_that_is_no_grid_is_named(tmp_path, text):
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(InvalidParamsError, match="grid"):
        load_grid(path)


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(InvalidParamsError, match="no grid file"):
        load_grid(tmp_path / "none.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidParamsError, match="not a readable text file"):
        load_grid(tmp_path / "bytes.yaml")


def test_all_problems_are_told_at_once():
    wrong = grid(
        defenses=["nonee", {"name": "noise", "set": {"snr": 1}}, "none"],
        attacks=["decoder", "decodr"],
    )
    found = problems(wrong.cells(), "cpu")
    assert len(found) == 3
    for word in ("nonee", "snr", "decodr"):
        assert any(word in line for line in found)
    assert not problems(grid().cells(), "cpu")
