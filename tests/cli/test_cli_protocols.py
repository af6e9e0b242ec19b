"""``mibench protocols`` and the page that is generated from the protocols."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cli_words import TINY
from hypothesis import given
from hypothesis import strategies as st
from test_cli_start import PROBE

from mibench.cli import protocols_page
from mibench.cli.protocol_text import NOT_SET, differences, flow, meanings
from mibench.files import canonical_json
from mibench.params import build, parse_yaml
from mibench.protocol import Protocol, Recipe, load_protocol, released

LITE, SMOKE = "cifar10-lite-v1", "procedural-smoke-v1"


@pytest.mark.parametrize(
    "words", [("list",), ("show", LITE), ("show", LITE, "--json"), ("diff", LITE, SMOKE)], ids=str
)
def test_nothing_heavy_is_imported(words):
    command = [sys.executable, "-c", PROBE, "protocols", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- list ---------------------------------------------------------------------------------------


def rows(output):
    """The words of each line that begins with an id."""
    found = [line.split() for line in output.splitlines()]
    return {words[0]: words for words in found if words and words[0] in released()}


def test_list_has_one_line_a_protocol_with_its_facts(invoke):
    listed = rows(invoke("protocols", "list").stdout)
    assert list(listed) == released()
    for name, words in listed.items():
        protocol = load_protocol(name)
        data, backbone = protocol.data, protocol.backbone
        assert words[1:8] == [
            protocol.track,
            "yes" if protocol.ranked else "never",
            protocol.content_id,
            data.dataset,
            str(data.image_size),
            f"{backbone.name}@{backbone.split_point}",
            str(data.attacked),
        ]
        assert (words[8] == "-") is (not protocol.minutes)


@pytest.mark.parametrize(
    ("words", "fits"),
    [
        (("--track", "smoke"), lambda p: p.track == "smoke"),
        (("--dataset", "cifar10"), lambda p: p.data.dataset == "cifar10"),
        (
            ("--dataset", "cifar10", "--track", "lite"),
            lambda p: p.data.dataset == "cifar10" and p.track == "lite",
        ),
    ],
    ids=("track", "dataset", "both"),
)
def test_filters_leave_what_fits(invoke, words, fits):
    listed = rows(invoke("protocols", "list", *words).stdout)
    assert list(listed) == [name for name in released() if fits(load_protocol(name))]
    assert 0 < len(listed) < len(released())


@pytest.mark.parametrize(
    ("option", "wrong", "near"),
    [("track", "lit", "lite"), ("dataset", "cifar11", "cifar10")],
)
def test_a_filter_that_fits_nothing_names_what_was_meant(refused, option, wrong, near):
    line = refused("protocols", "list", f"--{option}", wrong)
    assert f"unknown {option} {wrong!r}" in line
    assert f"{near!r}" in line


# --- show ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*released(), TINY])
def test_what_show_prints_is_the_protocol_as_a_file(invoke, name, tmp_path):
    done = invoke("protocols", "show", name)
    file = tmp_path / "shown.yaml"
    file.write_text(done.stdout, encoding="utf-8")
    assert load_protocol(str(file)) == load_protocol(name)


def test_show_spells_defaults_out_and_says_what_keys_mean(invoke):
    shown = invoke("protocols", "show", SMOKE).stdout
    assert re.search(r"^  warmup: 0\.15 +# share of the steps", shown, re.MULTILINE)
    assert re.search(r"^  transmissions: 1\b", shown, re.MULTILINE)
    assert re.search(r"^metrics: +# .*\n  mse: 1\n", shown, re.MULTILINE)
    given = set(yaml.safe_load(shown)["recipe"])
    assert given == set(Recipe.model_fields)


def test_every_key_of_a_recipe_has_a_meaning_of_one_line():
    assert set(meanings(Recipe)) == set(Recipe.model_fields)
    assert all("\n" not in text and "``" not in text for text in meanings(Recipe).values())
    assert set(meanings(Protocol)) == set(Protocol.model_fields)


@pytest.mark.parametrize("name", released())
def test_show_names_the_content_id_and_a_command_that_is_one(invoke, name):
    shown = invoke("protocols", "show", name).stdout
    assert load_protocol(name).content_id in shown.splitlines()[0]
    command = shown.splitlines()[1].partition("mibench ")[2].split()
    assert command[-2:] == ["--protocol", name]
    assert command[command.index("--attack") + 1] in load_protocol(name).attacks


def test_the_command_that_show_names_runs(invoke, tmp_path):
    file = tmp_path / "my own.yaml"
    file.write_text(Path(TINY).read_text(encoding="utf-8"), encoding="utf-8")
    line = invoke("protocols", "show", file).stdout.splitlines()[1]
    words = shlex.split(line.partition("mibench ")[2])
    done = invoke(*words, "--dry-run")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (LITE, f"differs from the released {LITE} in seeds"),
        ("mine-v1", "not a released protocol"),
    ],
)
def test_show_says_why_a_file_is_not_ranked(invoke, tmp_path, name, reason):
    values = load_protocol(LITE).model_dump(mode="json") | {"seeds": [41, 42], "id": name}
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    first = invoke("protocols", "show", file).stdout.splitlines()[0]
    assert first.endswith(f"never ranked: {reason}")
    assert invoke("protocols", "show", LITE).stdout.splitlines()[0].endswith(", ranked")


def test_json_is_the_values_and_nothing_else(invoke):
    done = invoke("protocols", "show", LITE, "--json")
    assert json.loads(done.stdout) == load_protocol(LITE).recorded()
    assert done.stderr == ""


# --- diff ---------------------------------------------------------------------------------------


def test_diff_shows_what_differs_side_by_side_and_nothing_else(invoke, tmp_path):
    values = load_protocol(SMOKE).model_dump(mode="json")
    values["recipe"]["zoom"] = 0.5
    values["adversary"]["coalition"] = 2
    del values["attacks"]["gradient"]["restarts"]
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    done = invoke("protocols", "diff", SMOKE, "mine.yaml")
    assert done.exit_code == 0
    lines = [line.split(maxsplit=2) for line in done.stdout.splitlines()]
    ids = load_protocol(SMOKE).content_id, load_protocol("mine.yaml").content_id
    assert lines[:2] == [[SMOKE, "mine.yaml"], ["key", *ids]]
    assert [[word.strip() for word in line] for line in lines[2:]] == [
        ["recipe.zoom", "null", "0.5"],
        ["adversary.coalition", "1", "2"],
        ["attacks.gradient.restarts", "1", NOT_SET],
    ]


def test_diff_says_when_there_is_none(invoke, tmp_path):
    values = load_protocol(SMOKE).model_dump(mode="json") | {"title": "in other words"}
    file = tmp_path / "same.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    for other in (SMOKE, "same.yaml"):
        done = invoke("protocols", "diff", SMOKE, other)
        assert done.exit_code == 0
        assert done.stdout.startswith("no difference: ")
        assert len(done.stdout.splitlines()) == 1


WRONG = "cifar10-lte-v1"


@pytest.mark.parametrize(
    "words", [("show", WRONG), ("diff", WRONG, SMOKE), ("diff", SMOKE, WRONG)], ids=" ".join
)
def test_a_wrong_id_names_the_one_that_was_meant(refused, words):
    line = refused("protocols", *words)
    assert f"did you mean {LITE!r}" in line


def test_a_file_that_is_not_there_is_said_so(refused):
    assert "no protocol file nowhere.yaml" in refused("protocols", "diff", LITE, "nowhere.yaml")


# --- the text of values -------------------------------------------------------------------------

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text() | st.sampled_from(["null", "1e-3", "true", "no", "0x10", "~", "a: b", "a, b", "#"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)  # fmt: skip


@given(VALUES)
def test_a_value_as_text_is_read_as_the_same_value(value):
    text = flow(value)
    assert "\n" not in text
    again = parse_yaml(text, "text")
    assert again == value
    assert flow(again) == text


@given(VALUES, VALUES)
def test_differences_are_none_exactly_where_values_are_the_same(one, other):
    assert not list(differences({"key": one}, {"key": one}))
    found = set(differences({"key": one}, {"key": other}))
    assert bool(found) is (canonical_json(one) != canonical_json(other))
    swapped = set(differences({"key": other}, {"key": one}))
    assert swapped == {(key, right, left) for key, left, right in found}


# --- the page -----------------------------------------------------------------------------------


def page_text():
    return protocols_page.PAGE.read_text(encoding="utf-8")


def test_the_page_is_what_the_protocols_give():
    made = protocols_page.page(page_text(), map(load_protocol, released()))
    assert page_text() == made, f"docs/protocols.md is out of date: run `{protocols_page.COMMAND}`"


def test_the_page_follows_a_protocol_and_keeps_what_people_wrote():
    values = load_protocol(LITE).model_dump(mode="json") | {"max_client_flops": 1_234_567}
    made = protocols_page.page(page_text(), [build(Protocol, values, "mine")])
    written, _, generated = made.partition(protocols_page.BEGIN)
    assert page_text().startswith(written + protocols_page.BEGIN)
    assert "1,234,567 FLOPs" in generated
    assert SMOKE not in generated


def test_a_page_without_its_mark_is_refused():
    with pytest.raises(ValueError, match="no line"):
        protocols_page.page("# Protocols\n", [])


def snippets():
    written = page_text().partition(protocols_page.BEGIN)[0]
    return [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", written, re.DOTALL)]


@pytest.mark.parametrize("lines", snippets(), ids=str)
def test_the_lines_that_the_page_shows_make_a_protocol(lines):
    values = load_protocol(LITE).model_dump(mode="json")
    for part, items in lines.items():
        values[part] |= items
    protocol = build(Protocol, values, "shown")
    for key, value in lines["adversary"].items():
        assert getattr(protocol.adversary, key) == value


def test_the_page_shows_each_strength_and_says_what_holds():
    shown = {lines["adversary"].get("auxiliary") for lines in snippets()}
    assert {"training", "other"} <= shown
    protocols = [load_protocol(name) for name in released()]
    assert {one.adversary.auxiliary for one in protocols} == {"disjoint"}
    cifar = [one.data for one in protocols if one.data.dataset.startswith("cifar")]
    assert {(data.train.count, data.auxiliary.count) for data in cifar} == {(30_000, 18_000)}
