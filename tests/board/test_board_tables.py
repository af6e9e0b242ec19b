"""Tables: what they hold, and that no label does anything in them."""

import csv
import functools
import html
import io
import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from board_runs import row_on
from hypothesis import given
from hypothesis import strategies as st

from mibench.board import rows, tables
from mibench.board.model import Board

words = st.text(st.characters(codec="utf-8"), max_size=40)
nasty = st.one_of(
    words,
    st.sampled_from(["<script>alert(1)</script>", "a|b", "=1+1", "@me", "[x](http://e.org)",
                     "`ls`", "\\input{x}", "$x$ % &", "-2+3", "+1", "a\nb", "www.e.org",
                     "![i](j)", "**b**", "\x1b[31m", "--- | ---"]),
)  # fmt: skip


@functools.cache
def whole():
    root = Path(tempfile.mkdtemp(prefix="mibench-tables-")) / "v1"
    row_on(root, defense="none", ssim=1.0, found=1.0, accuracy=0.76)
    row_on(root, defense="vib", ssim=0.2, found=0.2)
    row_on(root, defense="noise", params={"snr_db": -6.0}, accuracy=0.70, ssim=0.4)
    row_on(root, defense="mid", attack="decoder", accuracy=0.71)
    return rows.assemble(root)


@pytest.fixture
def board():
    return whole()


def named(label):
    """The board with another label on every row."""
    board = whole()
    return Board(
        board.version,
        tuple(
            replace(
                one, rows=tuple(replace(row, label=label, reasons=(label,)) for row in one.rows)
            )
            for one in board.sections
        ),
        (),
    )


def plain(label):
    """On one line, without what cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in label).split())


def cells_of(line):
    return [one.strip() for one in line.strip("|").split("|")]


def tables_in(text):
    """Tables of a Markdown text: a list of lines of cells each."""
    found, current = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            current.append(cells_of(line))
        elif current:
            found.append(current)
            current = []
    return found


def test_markdown_lists_ranked_rows_and_then_the_others_with_reasons(board):
    ranked, others = tables_in(tables.as_markdown(board))
    assert [line[:2] for line in ranked[2:]] == [["1", "vib"], ["2", "none"]]
    names = {html.unescape(line[0]): line[-1] for line in others[2:]}
    assert names["mid"].startswith("It was attacked with decoder alone")
    assert names["noise (snr_db=-6.0)"] == "It loses 6.00 points of accuracy, and 3 are allowed."


def test_the_short_table_is_of_the_first_section_and_capped(board, monkeypatch):
    (table,) = tables_in(tables.as_short_markdown(board))
    assert [line[1] for line in table[2:4]] == ["vib", "none"]
    assert len(table) == 2 + 4
    monkeypatch.setattr(tables, "SHORT", 3)
    text = tables.as_short_markdown(board)
    assert len(tables_in(text)[0]) == 2 + 3
    assert text.endswith("1 more rows are on the board.\n")


def test_json_holds_every_number_of_the_board(board):
    told = json.loads(tables.render(board)["board.json"])
    (section,) = told["sections"]
    assert [row["label"] for row in section["rows"]] == [r.label for r in board.sections[0].rows]
    for said, row in zip(section["rows"], board.sections[0].rows, strict=True):
        assert said["rank"] == (None if row.rank is None else list(row.rank))
        for place in ("scores", "leakage", "gain"):
            for name, score in getattr(row, place).items():
                value = said[place][name]["value"]
                assert value == (
                    None if score.value is None else pytest.approx(score.value, abs=1e-6)
                )
                assert (value is None) <= ("reason" in said[place][name])
    assert section["noise"]["attack"] == "suite"
    assert [one["accuracy"] for one in section["noise"]["points"]["ssim"]] == [0.7, 0.76]


def test_csv_has_a_line_for_each_row(board):
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(board))))
    assert [line["defense"] for line in lines] == [row.label for row in board.sections[0].rows]
    assert lines[0]["rank_best"] == "1"
    assert float(lines[0]["leakage_ssim"]) == pytest.approx(0.2, abs=1e-6)
    assert lines[-1]["rank_best"] == ""


def test_an_empty_board_has_tables_too():
    found = tables.render(Board("v1", (), ()))
    assert set(found) == {"board.json", "board.csv", "board.md", "board.tex"}
    assert json.loads(found["board.json"])["sections"] == []


@given(label=nasty)
def test_markdown_shows_a_label_and_does_nothing(label):
    text = tables.as_markdown(named(label))
    ranked, others = tables_in(text)
    assert {len(line) for line in ranked} == {12}
    assert {len(line) for line in others} == {12}
    cell = ranked[2][1]
    assert html.unescape(cell).replace("\u200b", "") == plain(label)
    assert not re.search(r"[<>\[\]`*_~!\\$\"{}@]|://|www\\.", cell)
    # Whoever is named in it is not called.
    assert not re.search(r"@(?!\u200b)", html.unescape(cell))


@given(label=nasty)
def test_latex_shows_a_label_and_does_nothing(label):
    escaped = tables.latex_escaped(label)
    commands = re.findall(r"\\([a-zA-Z]+)", escaped)
    assert set(commands) <= {"textbackslash", "textasciicircum", "textasciitilde", "textless",
                             "textgreater", "textbar", "textquotedbl"}  # fmt: skip
    bare = re.sub(r"\\[a-z]+\{\}|\\[{}$&#%_]|\{[\[\]]\}", "", escaped)
    assert not re.search(r'[\\{}$&#%_^~<>|"\[\]]', bare)
    body = [line for line in tables.as_latex(named(label)).splitlines() if "\\\\" in line]
    assert len(body) == 1 + 4
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {10}


@given(label=nasty)
def test_no_spreadsheet_takes_a_label_for_a_formula(label):
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(named(label)))))
    assert len(lines) == 4
    for line in lines:
        assert line["defense"][:1] not in ("=", "+", "-", "@", "\t", "\r")
        assert line["defense"].removeprefix("'") == plain(label).removeprefix("'")
