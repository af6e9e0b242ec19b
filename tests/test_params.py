"""Parameters: what is accepted, and that every refusal says where, what and what instead."""

import json
import math
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError, field_validator, model_validator

from mibench.errors import InvalidParamsError
from mibench.params import Parameters, build, parse_assignments, parse_yaml
from mibench.suggest import nearest, unknown


class Decoder(Parameters):
    steps: int = Field(3, ge=1)


class Example(Parameters):
    density: float = Field(0.04, gt=0, le=1)
    mode: Literal["a", "b"] = "a"
    betas: tuple[float, float] = (0.9, 0.99)
    layers: tuple[Annotated[int, Field(ge=0)], ...] = ()
    rate: float | None = None
    either: int | str = 3
    decoder: Decoder = Decoder()
    other: Decoder | None = None
    on: bool = False
    by_name: dict[str, int] = Field(default_factory=dict)
    label: str = Field("x", max_length=5, pattern="[a-z]*")


class Needed(Parameters):
    x: int


class Checked(Parameters):
    low: int = 0
    high: int = 1
    even: int = 2

    @field_validator("even")
    @classmethod
    def _even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("must be even")
        return value

    @model_validator(mode="after")
    def _ordered(self) -> "Checked":
        if self.low > self.high:
            raise ValueError("low must not exceed high")
        return self


def refusal(cls, values, owner="defense"):
    with pytest.raises(InvalidParamsError) as caught:
        build(cls, values, owner)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- build --------------------------------------------------------------------------------------


def test_good_values_of_every_kind():
    made = build(
        Example,
        {
            "density": 1,
            "mode": "b",
            "betas": [0, 0.5],
            "layers": [1, 2],
            "rate": 0.1,
            "either": "s",
            "decoder": {"steps": 5},
            "other": {"steps": 6},
            "on": True,
            "by_name": {"k": 1},
        },
        "defense",
    )
    assert made.density == 1.0
    assert isinstance(made.density, float)
    assert made.betas == (0.0, 0.5)
    assert made.layers == (1, 2)
    assert made.decoder == Decoder(steps=5)
    assert made.other == Decoder(steps=6)
    assert build(Example, {}, "defense") == Example()


def test_params_are_frozen_and_usable_from_python():
    made = Example(density=1, betas=(0.1, 0.2))
    with pytest.raises(ValidationError):
        made.density = 0.5
    assert build(Example, {"decoder": Decoder(steps=9)}, "d").decoder.steps == 9


def test_paths_are_taken_as_text():
    assert build(Example, {"either": Path("a")}, "d").either == "a"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"densty": 1},
            "unknown parameter defense.densty (given 1); did you mean 'density'? There are: betas,",
        ),
        (
            {"density": "4"},
            "defense.density: given '4' (a string), expected a number > 0 and <= 1 (default 0.04)",
        ),
        ({"density": 2}, "given 2, expected a number > 0 and <= 1 (default 0.04)"),
        ({"density": math.nan}, "finite"),
        ({"density": math.inf}, "defense.density: given Infinity, expected a number > 0 and <= 1"),
        ({"mode": "c"}, "defense.mode: given 'c' (a string), expected one of 'a', 'b'"),
        ({"betas": [1]}, "defense.betas[1] is missing; expected a number"),
        ({"betas": [1, "x"]}, "defense.betas[1]: given 'x' (a string), expected a number"),
        ({"betas": [1, 2, 3]}, "defense.betas: given [1, 2, 3], expected a list of 2 (a number; "),
        ({"layers": [1, -1]}, "defense.layers[1]: given -1, expected an integer >= 0"),
        ({"layers": 3}, "defense.layers: given 3, expected a list, each an integer >= 0"),
        ({"rate": "x"}, "defense.rate: given 'x' (a string), expected a number or null"),
        ({"either": [1]}, "defense.either: given [1], expected an integer or a string"),
        ({"decoder": {"steps": 0}}, "defense.decoder.steps: given 0, expected an integer >= 1"),
        (
            {"decoder": {"stps": 1}},
            "unknown parameter defense.decoder.stps (given 1); did you mean 'steps'?",
        ),
        ({"decoder": 3}, "defense.decoder: given 3, expected a mapping with the keys steps"),
        ({"decoder": None}, "defense.decoder: given null, expected a mapping"),
        ({"other": {"steps": True}}, "defense.other.steps: given true, expected an integer >= 1"),
        ({"on": 1}, "defense.on: given 1, expected true or false (default false)"),
        ({"on": "no"}, "defense.on: given 'no' (a string), expected true or false"),
        ({"by_name": {"k": 1.5}}, "defense.by_name.k: given 1.5, expected an integer"),
        ({"label": "toolong"}, "expected a string at most 5 long and of the form [a-z]*"),
        ({"density": {1}}, "defense: a value of type set cannot be a parameter"),
        ({"label": "y" * 500}, "yyy... (a string), "),
    ],
)
def test_refusals_say_where_what_and_what_instead(values, words):
    assert words in refusal(Example, values)


def test_union_branches_complain_once():
    assert refusal(Example, {"either": [1]}).count("defense.either") == 1


def test_all_wrong_keys_are_named_at_once():
    message = refusal(Example, {"mode": "c", "on": 1, "what": 2})
    assert "defense.mode" in message
    assert "defense.on" in message
    assert "defense.what" in message


def test_missing_keys():
    assert refusal(Needed, {}, "a") == "a.x is missing; expected an integer"


def test_values_that_are_no_mapping():
    assert "defense: given [1], expected a mapping with the keys" in refusal(Example, [1])


def test_own_checks_of_a_component_are_quoted():
    assert refusal(Checked, {"even": 3}, "c") == "c.even: given 3, must be even"
    assert refusal(Checked, {"low": 5}, "c") == "c: low must not exceed high"


def test_circular_values():
    loop: list = []
    loop.append(loop)
    assert refusal(Example, {"betas": loop}).startswith("defense: ")


def test_exponents_of_yaml_1_1_become_numbers_only_where_numbers_fit():
    made = build(
        Example,
        {"rate": "1e-3", "betas": ["1e-3", 1], "either": "1e3", "density": "1E-2"},
        "defense",
    )
    assert made.rate == 1e-3
    assert made.betas == (1e-3, 1.0)
    assert made.either == "1e3"
    assert made.density == 0.01
    assert "decoder.steps: given '1e2' (a string)" in refusal(
        Example, {"decoder": {"steps": "1e2"}}
    )


# --- assignments --------------------------------------------------------------------------------


def test_assignments_nest():
    items = ["defense.density=0.04", "attack.steps=50", "attack.decoder.steps=3"]
    assert parse_assignments(items, ["defense", "attack"]) == {
        "defense": {"density": 0.04},
        "attack": {"steps": 50, "decoder": {"steps": 3}},
    }
    assert parse_assignments([]) == {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        (".5", 0.5),
        ("1.", 1.0),
        ("-3", -3),
        ("+3", 3),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("12:30:00", "12:30:00"),
        ("2020-01-01", "2020-01-01"),
        ("1_000", "1_000"),
        ("null", None),
        ("~", None),
        ("'1e-3'", "1e-3"),
        ("''", ""),
        ("a=b", "a=b"),
        ("[1, 2e-1]", [1, 0.2]),
        ("{a: 1}", {"a": 1}),
        ("1.2.3", "1.2.3"),
    ],
)
def test_yaml_traps(text, value):
    got = parse_assignments([f"a.b={text}"])["a"]["b"]
    assert got == value
    assert type(got) is type(value)


def test_infinities_are_read_and_then_refused():
    assert parse_assignments(["a.b=-.inf"])["a"]["b"] == -math.inf
    assert math.isnan(parse_assignments(["a.b=.nan"])["a"]["b"])


@pytest.mark.parametrize(
    "item", ["a=1", "a.b", "=1", "", ".b=1", "a.=1", "a..b=1", "a.b c=1", "a.1=2", "a.b=", "a.b=#f"]
)
def test_malformed_assignments_name_the_item_and_the_form(item):
    with pytest.raises(InvalidParamsError) as caught:
        parse_assignments([item])
    assert repr(item) in str(caught.value)
    assert "expected root.key=value" in str(caught.value)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ("a.b=[1", "expected ',' or ']'"),
        ("a.b={1: 2}", "the key 1 is not a string"),
        ("a.b={x: 1, x: 2}", "the key 'x' is there twice"),
        ("a.b=@x", "cannot start any token"),
        ("a.b=!!timestamp foo", "not valid YAML"),
        ("a.b=!!set {x}", "only plain values"),
        ("a.b=&a [*a]", "not valid YAML"),
        ("a.b=!!python/name:os.system", "could not determine a constructor"),
        ("a.b=" + "[" * 5000, "not valid YAML"),
    ],
)
def test_values_that_are_not_yaml(item, words):
    with pytest.raises(InvalidParamsError) as caught:
        parse_assignments([item])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "items",
    [
        ["a.b=1", "a.b=2"],
        ["a.b=1", "a.b.c=2"],
        ["a.b.c=1", "a.b=2"],
        ["a.b={c: 1}", "a.b.c=2"],
    ],
)
def test_one_key_is_set_once(items):
    with pytest.raises(InvalidParamsError, match="set the same key") as caught:
        parse_assignments(items)
    assert all(repr(item) in str(caught.value) for item in items)


def test_unknown_roots():
    with pytest.raises(InvalidParamsError, match="did you mean 'defense'"):
        parse_assignments(["defence.x=1"], ["defense", "attack"])


def test_yaml_documents_name_the_line():
    assert parse_yaml("a: 1e-3\nb: [no]\n", "p.yaml") == {"a": 1e-3, "b": ["no"]}
    with pytest.raises(InvalidParamsError, match=r"p\.yaml is not valid YAML in line 2"):
        parse_yaml("a: 1\nb: @\n", "p.yaml")


words = st.text(
    st.characters(codec="utf-8", exclude_categories=["C", "Z"], include_characters=" "),
    max_size=8,
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)
keys = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,5}", fullmatch=True)


def test_infinities_are_written_as_in_yaml():
    found = parse_assignments(["a.x=.inf", "a.y=-.inf", 'a.z="Infinity"'])
    assert found == {"a": {"x": float("inf"), "y": float("-inf"), "z": "Infinity"}}


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.tuples(keys, keys), values, max_size=4))
def test_what_is_written_is_read(assigned):
    items = [
        f"{root}.{key}={json.dumps(value, ensure_ascii=False)}"
        for (root, key), value in assigned.items()
    ]
    expected: dict = {}
    for (root, key), value in assigned.items():
        expected.setdefault(root, {})[key] = value
    assert parse_assignments(items) == expected


@settings(max_examples=40, deadline=None)
@given(st.lists(keys, min_size=3, max_size=5), st.integers())
def test_nested_keys_are_read(path, value):
    found = parse_assignments([f"{'.'.join(path)}={value}"])
    for part in path:
        found = found[part]
    assert found == value


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_in_one_line(text):
    message = ""
    try:
        parse_assignments([text, f"a.b={text}"])
    except InvalidParamsError as error:
        message = str(error)
    assert "\n" not in message


# --- suggestions --------------------------------------------------------------------------------


def test_nearest():
    options = ["noise", "none", "privdfs", "bottleneck", "diffusion"]
    assert nearest("privdf", options) == ["privdfs"]
    assert nearest("PRIVDFS", options) == ["privdfs"]
    assert nearest("nosie", options)[0] == "noise"
    assert nearest("diff", options) == ["diffusion"]
    assert nearest("qqqqqq", options) == []
    assert nearest("", options) == []
    assert nearest("small_resnet", ["small-resnet"]) == ["small-resnet"]
    assert len(nearest("aaaa", ["aaab", "aaac", "aaad", "aaae"])) == 3


def test_unknown():
    assert unknown("defense", "privdf", ["privdfs", "none"]) == (
        "unknown defense 'privdf'; did you mean 'privdfs'? There are: none, privdfs"
    )
    assert unknown("defense", "q", []) == "unknown defense 'q'; There are: none"
