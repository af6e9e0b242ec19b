"""Protocols: what is refused, and what the content id sees."""

import copy
import typing

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mibench.errors import InvalidParamsError, MibenchError, UnknownNameError
from mibench.params import build
from mibench.protocol import Protocol, RoleRule, load_protocol, released

ROLES = ("train", "auxiliary", "validation", "private")
SILENT = {"title", "minutes"}
"""Top-level keys that cannot change a result."""

BASE = {
    "id": "toy-v1",
    "track": "test",
    "title": "a toy",
    "data": {
        "dataset": "procedural",
        "image_size": 32,
        "train": {"split": "stream", "start": 0, "count": 10},
        "auxiliary": {"split": "stream", "start": 100, "count": 10},
        "validation": {"split": "stream", "start": 200, "count": 10},
        "private": {"split": "stream", "start": 300, "count": 10},
        "attacked": 4,
    },
    "backbone": {"name": "small-resnet", "params": {"stem": 8}, "split_point": "stem"},
    "recipe": {"steps": 5, "clip": 1.0},
    "adversary": {"knowledge": "white_box", "coalition": 1},
    "attacks": {"decoder": {"steps": 10, "batch": 4}},
    "seeds": [0, 1],
    "max_client_flops": 1000,
    "minutes": {"fit": 1.5},
}


def made(values):
    return build(Protocol, values, "toy")


def changed(path, value):
    values = copy.deepcopy(FULL)
    inner = values
    for step in path[:-1]:
        inner = inner[step]
    inner[path[-1]] = value
    return values


def leaves(value, path=()):
    """Paths to every plain value of a nested mapping; lists count as one value."""
    if not isinstance(value, dict):
        return [path]
    return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]


def at(value, path):
    for step in path:
        value = value[step]
    return value


def others(value):
    """Values of the same type that differ, the likeliest to be valid first."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value / 2, value - 1]
    if isinstance(value, list):
        return [[*value, value[0]], value[:1]]
    words = ("lite", "smoke", "adamw", "sgd", "bf16", "fp32", "black_box", "data_only")
    return [word for word in words if word != value] + [f"{value}-other"]


# With every default spelled out, so that each field of the model is a key.
FULL = made(BASE).model_dump(mode="json")


def test_every_field_of_the_model_is_covered_below():
    assert set(FULL) == set(Protocol.model_fields)
    assert {path[0] for path in leaves(FULL)} == set(FULL)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=".".join(p)) for p in leaves(FULL)],
)
def test_content_id_follows_every_value_that_can_change_a_result(path):
    before = made(FULL).content_id
    variants = []
    for value in others(at(FULL, path)):
        try:
            variants.append(made(changed(path, value)))
        except InvalidParamsError:
            continue
    assert variants, "no other valid value was found: extend others()"
    for variant in variants:
        assert at(variant.model_dump(mode="json"), path) != at(FULL, path)
        assert (variant.content_id == before) is (path[0] in SILENT)


@given(st.randoms(use_true_random=False))
def test_content_id_does_not_see_the_order_of_keys(random):
    def shuffled(value):
        if not isinstance(value, dict):
            return value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    assert made(shuffled(FULL)).content_id == made(FULL).content_id


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=2),
    st.lists(st.integers(1, 9), min_size=2, max_size=2),
)
def test_overlap_of_ranges_is_that_of_their_sets(starts, counts):
    one, two = (RoleRule(split="s", start=s, count=c) for s, c in zip(starts, counts, strict=True))
    images = [set(range(s, s + c)) for s, c in zip(starts, counts, strict=True)]
    assert one.overlaps(two) is two.overlaps(one) is bool(images[0] & images[1])
    assert not one.overlaps(RoleRule(split="t", start=starts[0], count=counts[0]))


@pytest.mark.parametrize("one", ROLES)
@pytest.mark.parametrize("other", ROLES)
def test_roles_that_share_an_image_are_refused(one, other):
    if one == other:
        return
    last = FULL["data"][other]["start"] + FULL["data"][other]["count"] - 1
    with pytest.raises(InvalidParamsError, match="share images") as caught:
        made(changed(("data", one, "start"), last))
    assert repr(one) in str(caught.value)
    assert repr(other) in str(caught.value)
    made(changed(("data", one, "start"), last + 1))


def test_more_attacked_than_private_images_are_refused():
    with pytest.raises(InvalidParamsError, match="attacked is 11"):
        made(changed(("data", "attacked"), 11))


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        (("recipee",), "recipe"),
        (("data", "auxilary"), "auxiliary"),
        (("recipe", "warmpu"), "warmup"),
        (("adversary", "colition"), "coalition"),
    ],
)
def test_unknown_key_names_the_nearest(path, nearest, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(changed(path, 1)))
    with pytest.raises(InvalidParamsError, match=f"did you mean '{nearest}'") as caught:
        load_protocol(str(file))
    assert path[-1] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_gives_what_its_values_give(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(BASE))
    assert load_protocol(str(file)) == made(BASE)
    assert load_protocol(str(file)).content_id == made(FULL).content_id


@pytest.mark.parametrize("name", released())
def test_released_protocol_loads_under_its_own_id(name):
    protocol = load_protocol(name)
    assert protocol.id == name
    assert protocol.ranked is (protocol.track in ("lite", "standard"))


def test_there_are_released_protocols():
    assert released()
    assert any(load_protocol(name).ranked for name in released())


def test_unknown_protocol_names_the_nearest():
    name = released()[0]
    with pytest.raises(UnknownNameError, match=name):
        load_protocol(name[:-1])
    with pytest.raises(UnknownNameError, match=r"nowhere\.yaml"):
        load_protocol("nowhere.yaml")


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "", "just text"])
def test_a_file_that_is_no_mapping_is_refused_in_one_line(text, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(InvalidParamsError) as caught:
        load_protocol(str(file))
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text(yaml.safe_dump(BASE) + "\nseeds: [7]\n")
    with pytest.raises(InvalidParamsError, match="seeds"):
        load_protocol(str(file))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "bytes.yaml"
    file.write_bytes(b"id: \xff\xfe\n")
    with pytest.raises(MibenchError):
        load_protocol(str(file))


def test_a_protocol_cannot_be_changed():
    protocol = made(BASE)
    with pytest.raises(ValueError, match="frozen"):
        typing.cast("typing.Any", protocol).seeds = (3,)
