"""The pages as text: whole, the same each time, and nothing from outside acts in them."""

import base64
import hashlib
import re
import shlex
from dataclasses import replace
from itertools import pairwise

import pytest
from board_pages import ADVISORY, Page, edited, small_board, with_gallery, with_text
from board_runs import numbers, put
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mibench.board import page, view, words
from mibench.board.model import BestKnown, Board, Level, Origin
from mibench.board.rows import assemble
from mibench.errors import RecordError
from mibench.params import parse_assignments
from mibench.record import Score

OUTSIDE = re.compile(r"https://[^\s<>\"'`\\]+")
HOSTILE = (
    "<script>alert(1)</script>", "</style><script>alert(1)</script>", "</script>", "-->", "<!--",
    "\"><img src=x onerror=alert(1)>", "' onmouseover='alert(1)", "javascript:alert(1)",
    "JaVaScRiPt:alert(1)", "data:text/html,<script>1</script>", "{{ 7 * 7 }}", "{% raw %}",
    "&lt;b&gt;", "]]>", "https://example.org/\"onload=\"x", "https://user@example.org/",
    "//example.org", "\\\"'`", "a\nb", "",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return small_board(tmp_path_factory.mktemp("board"))


def score(name, value, low=None, high=None):
    return Score(
        metric=name, version=1, unit="", higher_is_better=True, value=value, ci_low=low,
        ci_high=high, n=128, reason=None if value is not None else "nobody knows",
    )  # fmt: skip


def test_every_row_has_a_page_and_the_bytes_are_the_same_each_time(made):
    root, board = made
    found = page.render(board, root)
    slugs = {f"rows/{row.slug}.html" for section in board.sections for row in section.rows}
    assert set(found) == {"index.html", *slugs}
    assert len(slugs) == 6
    assert found == page.render(assemble(root), root)


def test_pages_are_well_formed_and_need_nothing_from_elsewhere(made):
    root, board = made
    for name, data in page.render(board, root).items():
        read = Page(data)
        assert read.wrong == []
        assert read.open == [], name
        for tag, attributes in read.tags:
            assert tag not in ("img", "iframe", "object", "embed", "base"), name
            assert not [key for key in attributes if key.startswith("on") or key == "style"]
        assert read.count("script") == read.count("style") == 1
        assert read.attributes("src") == []


def test_the_policy_allows_the_one_script_and_the_one_style(made):
    root, board = made
    for data in page.render(board, root).values():
        text = data.decode()
        policy = next(
            attributes["content"]
            for _, attributes in Page(data).tags
            if attributes.get("http-equiv") == "Content-Security-Policy"
        )
        for kind in ("script", "style"):
            inside = re.search(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL)[1]
            digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy


def test_every_link_inside_the_site_leads_to_a_page_or_an_anchor(made):
    root, board = made
    found = page.render(board, root)
    for name, data in found.items():
        own = set(Page(data).attributes("id"))
        for to in Page(data).attributes("href"):
            if to == "data:," or "/records/" in to:
                continue
            path, _, anchor = to.partition("#")
            target = name if not path else path.removeprefix("../")
            if name != "index.html" and path and not path.startswith("../"):
                target = f"rows/{path}"
            assert target in found, (name, to)
            there = own if not path else set(Page(found[target]).attributes("id"))
            assert not anchor or anchor in there, (name, to)


def test_records_that_pages_link_to_are_there(made):
    root, board = made
    for name, data in page.render(board, root).items():
        place = (root / "site" / name).parent
        linked = [to for to in Page(data).attributes("href") if "/records/" in to]
        for to in linked:
            assert (place / to).resolve().is_file(), to
        assert bool(linked) == name.startswith("rows/")


# --- text from outside ---------------------------------------------------------------------------


def shape(data):
    """The tags of a page with the names of their attributes: what text must not change."""
    return [(tag, sorted(attributes)) for tag, attributes in Page(data).tags]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.sampled_from(HOSTILE) | st.text(max_size=40))
def test_text_from_outside_is_inert(made, text):
    root, board = made
    plain = page.render(with_text(board, "x"), root)
    found = page.render(with_text(board, text), root)
    may_link = words.address(text) is not None
    for name, data in found.items():
        read = Page(data)
        assert read.wrong == []
        assert read.count("script") == read.count("style") == 1
        for tag, attributes in read.tags:
            assert not [key for key in attributes if key.startswith("on") or key == "style"]
            for to in (attributes.get("href"), attributes.get("src")):
                if to is not None and re.match(r"[a-z]+:", to, re.IGNORECASE):
                    assert to == "data:," or OUTSIDE.fullmatch(to), (tag, to)
        if text.strip() and not may_link:
            assert shape(data) == shape(plain[name]), name


@pytest.mark.parametrize("text", [one for one in HOSTILE if one.strip()])
def test_text_from_outside_is_shown_as_it_is(made, text):
    root, board = made
    found = page.render(with_text(board, text), root)
    slug = board.sections[0].rows[-1].slug
    assert text in Page(found["index.html"]).text
    assert text in Page(found[f"rows/{slug}.html"]).text


@pytest.mark.parametrize(
    ("text", "to"),
    [
        ("https://example.org/a?b=c#d", "https://example.org/a?b=c#d"),
        ("2104.00001", "https://arxiv.org/abs/2104.00001"),
        ("arXiv:2104.00001v2", "https://arxiv.org/abs/2104.00001v2"),
        ("http://example.org", None),
        ("10.1000/182", None),
        ("javascript:alert(1)", None),
        (" https://example.org", None),
        ("https://", None),
        ("https:///path", None),
        ("https://a b", None),
        ("https://user@example.org/", None),
        ("https://example.org/\n", None),
        ("https://[broken/", None),
        ("HTTPS://example.org", None),
    ],
)
def test_only_https_and_arxiv_are_links(text, to):
    assert words.address(text) == to


@pytest.mark.parametrize("slug", ["", "..", "a/b", "a b", "<b>", ".hidden"])
def test_a_slug_that_is_no_name_of_a_file_is_refused(made, slug):
    root, board = made
    with pytest.raises(RecordError, match="cannot have a page"):
        page.render(edited(board, 0, slug=slug), root)


def test_two_rows_never_share_a_page(made):
    root, board = made
    other = board.sections[0].rows[1].slug
    with pytest.raises(RecordError, match="two rows"):
        page.render(edited(board, 0, slug=other), root)


# --- what stands there ---------------------------------------------------------------------------


def test_ranked_rows_stand_first_and_the_others_say_why_they_have_no_rank(made):
    root, board = made
    text = Page(page.render(board, root)["index.html"]).text
    rows = board.sections[0].rows
    ranked = [row for row in rows if row.ranked]
    assert ranked
    assert len(ranked) < len(rows)
    first, below = text.index("blind guess"), text.index("Not ranked")
    assert below < first
    for row in rows:
        assert all(reason in text for reason in row.reasons)


def test_a_dash_tells_its_reason(made):
    root, board = made
    row = board.sections[0].rows[0]
    blank = edited(board, 0, scores=row.scores | {"ssim": score("ssim", None)})
    for name in ("index.html", f"rows/{row.slug}.html"):
        assert "nobody knows" in Page(page.render(blank, root)[name]).attributes("title"), name


def test_an_accuracy_that_is_not_known_is_a_dash(made):
    root, board = made
    unknown = page.render(edited(board, 0, accuracy=float("nan"), drop=float("nan")), root)
    assert b"nan" not in unknown["index.html"].lower().replace(b"finance", b"")


def test_an_advisory_and_a_successor_are_told_on_both_pages(made):
    root, board = made
    rows = board.sections[0].rows
    told = edited(board, 0, advisories=(ADVISORY,), superseded_by=rows[1].headline[0].id)
    told = replace(told, advisories=(ADVISORY,))
    found = page.render(told, root)
    index, own = Page(found["index.html"]), Page(found[f"rows/{rows[0].slug}.html"])
    assert ADVISORY.text in index.text
    assert ADVISORY.text in own.text
    assert "#advisory-2026-001" in index.attributes("href")
    assert f"rows/{rows[1].slug}.html" in index.attributes("href")
    assert f"{rows[1].slug}.html" in own.attributes("href")


def test_a_best_known_attack_is_credited(made):
    root, board = made
    best = BestKnown(
        record="0" * 16,
        by="patient",
        origin=Origin(kind="submission", authors=["C. Ritic"], paper="2104.00001"),
        level=Level.RESCORED,
        scores=[score("ssim", 0.97, 0.96, 0.98)],
        permuted=[],
        leakage=[score("leakage(ssim)", 0.94, 0.93, 0.95)],
    )
    row = board.sections[0].rows[0]
    found = page.render(edited(board, 0, best_known={"ssim": best}), root)
    own = Page(found[f"rows/{row.slug}.html"])
    assert "C. Ritic" in own.text
    assert "https://arxiv.org/abs/2104.00001" in own.attributes("href")
    assert "known 0.94" in Page(found["index.html"]).text


def test_claims_are_marked_as_claims(made):
    root, board = made
    row = board.sections[0].rows[0]
    found = page.render(edited(board, 0, entry={"claims": {"ssim": 0.123}}), root)
    text = Page(found[f"rows/{row.slug}.html"]).text
    assert "Claims of the authors" in text
    assert "ssim: 0.123 (claimed)" in text


def test_the_commands_run_the_record_again(made):
    _, board = made
    for row in board.sections[0].rows:
        (_, again), (_, run) = view.commands(row.headline[0], board.version)
        record = row.headline[0].record
        assert again == f"mibench reproduce leaderboard/v1/records/{row.headline[0].id}"
        words_of = shlex.split(run)
        given = [b for a, b in pairwise(words_of) if a == "--set"]
        assert parse_assignments(given).get("defense", {}) == record.defense.params
        for option, value in (
            ("--defense", record.defense.name),
            ("--attack", record.attack.name),
            ("--protocol", record.protocol.id),
            ("--seed", str(record.seed)),
        ):
            assert words_of[words_of.index(option) + 1] == value


@given(text=st.text(min_size=1, max_size=30))
def test_a_parameter_reaches_the_shell_as_one_word(made, text):
    _, board = made
    record = board.sections[0].rows[0].headline[0].record
    odd = record.defense.model_copy(update={"params": {"name": text}, "location": text})
    row = edited(board, 0, record={"defense": odd}).sections[0].rows[0]
    _, (_, run) = view.commands(row.headline[0], board.version)
    told = shlex.split(run)
    assert told[:4] == ["mibench", "run", "--defense", text]
    assert [one for one in told if one.startswith("defense.name=")] == told[-3:-2]


def test_a_run_that_departs_is_only_reproduced(made):
    root, board = made
    slug = board.sections[0].rows[0].slug
    found = page.render(edited(board, 0, record={"deviations": ["other images"]}), root)
    text = Page(found[f"rows/{slug}.html"]).text
    assert "mibench reproduce" in text
    assert "mibench run" not in text


def test_several_seeds_are_told_one_by_one(made):
    root, board = made
    row, other = board.sections[0].rows[:2]
    both = edited(board, 0, headline=(*row.headline, *other.headline))
    text = Page(page.render(both, root)[f"rows/{row.slug}.html"]).text
    assert "Each seed" in text
    assert all(f"provenance of record {one.id}" in text for one in (*row.headline, *other.headline))


def test_an_empty_board_has_a_page(tmp_path):
    found = page.render(Board("v1", (), ()), tmp_path)
    assert "no rows yet" in Page(found["index.html"]).text


# --- pictures ------------------------------------------------------------------------------------


def test_a_gallery_shows_each_cell_once_with_its_score(made):
    root, board = made
    row = board.sections[0].rows[0]
    found = page.render(with_gallery(board, 0, [7, 3, 0, 1, 2]), root)
    read = Page(found[f"rows/{row.slug}.html"])
    boxes = [at["viewbox"] for tag, at in read.tags if tag == "svg" and at.get("class") == "crop"]
    assert boxes == [f"{x} {y} 32 32" for y in range(0, 160, 32) for x in (0, 32, 64)]
    assert f"../../records/{row.headline[0].id}/gallery.webp" in read.attributes("href")
    assert "no. 7" in read.text


def test_a_row_without_a_picture_says_why(made):
    root, board = made
    row = board.sections[0].rows[0]
    own = page.render(edited(board, 0, entry={"gallery_reason": "faces are private"}), root)
    assert "faces are private" in Page(own[f"rows/{row.slug}.html"]).text


def test_the_same_first_images_stand_behind_every_row(made):
    root, board = made
    both = with_gallery(with_gallery(board, 0, [7, 3, 0, 1, 2]), 1, [2, 1, 0, 9, 3])
    read = Page(page.render(both, root)["index.html"])
    labels = [at["aria-label"] for _, at in read.tags if at.get("class") == "crop"]
    assert labels == [f"{what}, image {n}" for what in ("original", "decoder", "decoder")
                      for n in range(4)]  # fmt: skip


def test_images_that_not_every_gallery_has_are_not_compared(made):
    root, board = made
    some = with_gallery(with_gallery(board, 0, [7, 3, 0, 1, 2]), 1, [5, 6, 7])
    assert "crop" not in Page(page.render(some, root)["index.html"]).attributes("class")


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (0.8049, 2, "0.80"),
        (-0.001, 2, "0.00"),
        (-0.25, 1, "−0.2"),
        (1234567, 0, "1,234,567"),
        (0.0000065, 4, "6e−06"),
        (0.0, 4, "0.0000"),
    ],
)
def test_numbers(value, digits, text):
    assert words.number(value, digits) == text


def test_an_interval_with_a_minus_is_in_words():
    assert words.between(-0.02, 0.03, 2) == "−0.02 to 0.03"
    assert words.between(0.02, 0.03, 2) == "0.02–0.03"


def test_several_coalitions_are_drawn(tmp_path):
    root = tmp_path / "leaderboard" / "v1"
    values, table = numbers(attack="decoder")
    scored = [one for one in values["scores"] if one["value"] is not None]
    values["suite"] = [
        {"attack": f"decoder@{server}", "corrupted": [server], "reason": None, "facts": {},
         "share_of_worst": {}, "seconds_per_image": 0.1,
         "scores": [one | {"value": one["value"] * (1 - server / 10)} for one in scored]}
        for server in range(3)
    ]  # fmt: skip
    put(root, values, table)
    board = assemble(root)
    (row,) = board.sections[0].rows
    found = page.render(board, root)[f"rows/{row.slug}.html"]
    assert "Coalitions" in Page(found).text
    told = [one for one in Page(found).attributes("aria-label") if "servers read: 2" in one]
    assert len(told) == 1
