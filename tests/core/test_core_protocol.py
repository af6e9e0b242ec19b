"""Protocols: what is refused, and what the content id sees."""

import copy
import json
import typing
from itertools import combinations

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from released import add

from mibench.errors import InvalidParamsError, MibenchError, UnknownNameError
from mibench.params import build
from mibench.protocol import METRICS, DataRule, Protocol, RoleRule, load_protocol, released

ROLES = ("train", "auxiliary", "validation", "private")
SILENT = {"title", "references", "minutes", "metrics", "judge"}
"""Top-level keys that the content id does not see."""

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
    "judge": {"recipe": {"steps": 5}},
    "seeds": [0, 1],
    "max_client_flops": 1000,
    "references": {"decoder": 30.0},
    "minutes": {"fit": 1.5},
}


def made(values):
    return build(Protocol, values, "toy")


def changed(path, value, base=None):
    return edited({path: value}, base)


def edited(edits, base=None):
    values = copy.deepcopy(base or FULL)
    for path, value in edits.items():
        at(values, path[:-1])[path[-1]] = value
    return values


def without(paths):
    values = copy.deepcopy(FULL)
    for path in paths:
        del at(values, path[:-1])[path[-1]]
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
    """Values that differ, of the same type where there is one, the likeliest to be valid first."""
    if value is None:
        return [0.5, [0.25, 0.75], 3, "0123456789abcdef"]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1, value + 0.25, value - 1]
    if isinstance(value, list):
        return [[*value, value[0]], value[:1]]
    words = ("lite", "smoke", "adamw", "sgd", "bf16", "fp32", "black_box", "data_only")
    return [word for word in words if word != value] + [f"{value}-other"]


# With every default spelled out, so that each field of the model is a key.
FULL = made(BASE).model_dump(mode="json")
# The same with a split for each role, so that any range or interval is fine.
APART = edited(
    {("data", role, "split"): role for role in ROLES} | {("data", r, "start"): 0 for r in ROLES}
)
OTHER = {
    ("data", "auxiliary", "dataset"): "cifar100",
    ("data", "validation", "dataset"): "cifar100",
    ("adversary", "auxiliary"): "other",
}
"""An attacker without images of the same kind."""
NEVER_ALONE = {*OTHER, ("data", "train", "dataset"), ("data", "private", "dataset")}
"""Keys that no protocol can change alone; what changes together is tested by itself."""


def test_every_field_of_the_model_is_covered_below():
    assert set(FULL) == set(Protocol.model_fields)
    assert {path[0] for path in leaves(FULL)} == set(FULL)


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=".".join(p)) for p in leaves(FULL) if p not in NEVER_ALONE],
)
def test_content_id_follows_every_value_that_can_change_a_result(path):
    before = made(APART).content_id
    variants = []
    for value in others(at(APART, path)):
        try:
            variants.append(made(changed(path, value, APART)))
        except InvalidParamsError:
            continue
    assert variants, "no other valid value was found: extend others()"
    for variant in variants:
        assert at(variant.model_dump(mode="json"), path) != at(APART, path)
        assert (variant.content_id == before) is (path[0] in SILENT)


def test_content_id_follows_whose_images_the_attacker_has():
    overlapping = {("data", "auxiliary", "start"): 5, ("adversary", "auxiliary"): "training"}
    third = {key: value.replace("100", "10") for key, value in OTHER.items()}
    ids = [made(edited(edits)).content_id for edits in ({}, overlapping, OTHER, third)]
    assert len(set(ids)) == 4


def is_default(path):
    try:
        return made(without([path])) == made(FULL)
    except InvalidParamsError:
        return False


DEFAULTS = [path for path in leaves(FULL) if is_default(path)]


def test_fields_with_a_default_are_found():
    assert {("recipe", "zoom"), ("adversary", "transmissions"), ("batch",)} <= set(DEFAULTS)
    assert ("recipe", "clip") not in DEFAULTS


@given(st.sets(st.sampled_from(DEFAULTS)))
def test_content_id_does_not_see_whether_a_default_is_spelled_out(left_out):
    assert made(without(left_out)).content_id == made(FULL).content_id


def test_content_id_does_not_see_a_whole_part_of_defaults():
    assert made(without([("adversary",), ("metrics",)])).content_id == made(FULL).content_id


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


BOUNDS = st.tuples(st.integers(0, 8), st.integers(0, 8)).filter(lambda both: both[0] < both[1])


@given(BOUNDS, BOUNDS)
def test_overlap_of_intervals_is_that_of_their_sets(first, second):
    one, two = (RoleRule(split="s", hashed=(a / 8, b / 8)) for a, b in (first, second))
    shared = set(range(*first)) & set(range(*second))
    assert one.overlaps(two) is two.overlaps(one) is bool(shared)
    assert not one.overlaps(RoleRule(split="t", hashed=one.hashed))
    assert not one.overlaps(RoleRule(split="s", hashed=one.hashed, dataset="another"))


def test_a_range_and_an_interval_may_share_images_wherever_they_lie():
    by_range = RoleRule(split="s", start=1000, count=1)
    by_hash = RoleRule(split="s", hashed=(0.0, 0.01), count=1)
    assert by_range.overlaps(by_hash)
    assert by_hash.overlaps(by_range)
    assert not by_hash.overlaps(RoleRule(split="t", start=1000, count=1))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"count": None}, "needs a count"),
        ({"hashed": [0.5, 0.5]}, "is an interval"),
        ({"hashed": [0.6, 0.5]}, "is an interval"),
        ({"hashed": [-0.1, 0.5]}, "is an interval"),
        ({"hashed": [0.5, 1.1]}, "is an interval"),
        ({"hashed": [0.0, 0.5], "start": 1}, "without start"),
        ({"hashed": [0.5]}, "is missing"),
        ({"count": 0}, "> 0"),
        ({"start": -1}, ">= 0"),
    ],
)
def test_a_role_that_says_nothing_clear_is_refused_in_one_line(values, reason):
    role = {"split": "stream", "start": 0, "count": 10}
    with pytest.raises(InvalidParamsError, match=reason) as caught:
        made(changed(("data", "private"), role | values))
    assert "data.private" in str(caught.value)
    assert "\n" not in str(caught.value)


SHARING = [pair for pair in combinations(ROLES, 2) if pair != ("train", "auxiliary")]


@pytest.mark.parametrize("pair", [*SHARING, *(pair[::-1] for pair in SHARING)], ids="-".join)
def test_roles_that_share_an_image_are_refused(pair):
    one, other = pair
    last = FULL["data"][other]["start"] + FULL["data"][other]["count"] - 1
    with pytest.raises(InvalidParamsError, match="share images") as caught:
        made(changed(("data", one, "start"), last))
    assert repr(one) in str(caught.value)
    assert repr(other) in str(caught.value)
    made(changed(("data", one, "start"), last + 1))


def test_roles_by_hash_are_as_disjoint_as_their_intervals():
    bounds = (0.0, 0.5, 0.7, 0.75, 1.0)
    roles = {
        ("data", role): {"split": "all", "hashed": list(bounds[n : n + 2])}
        for n, role in enumerate(ROLES)
    }
    assert made(edited(roles)).data.strength == "disjoint"
    roles["data", "validation"]["hashed"] = [0.7, 0.76]
    with pytest.raises(InvalidParamsError, match="'validation' and 'private' share images"):
        made(edited(roles))
    # A range among them could hold any image.
    roles["data", "validation"] = {"split": "all", "start": 10_000, "count": 1}
    with pytest.raises(InvalidParamsError, match="'train' and 'validation' share images"):
        made(edited(roles))


@given(st.integers(0, 30), st.integers(1, 20))
def test_strength_is_training_where_the_attacker_holds_a_training_image(start, count):
    values = edited({("data", "auxiliary"): {"split": "stream", "start": start, "count": count}})
    shared = set(range(10)) & set(range(start, start + count))
    strength = "training" if shared else "disjoint"
    values["adversary"]["auxiliary"] = strength
    assert made(values).data.strength == strength


def test_strength_is_other_for_another_dataset_at_the_same_place():
    overlapping = edited(OTHER | {("data", "auxiliary", "start"): 0})
    assert made(overlapping).data.strength == "other"


@pytest.mark.parametrize("declared", ["training", "disjoint", "other"])
@pytest.mark.parametrize("found", ["training", "disjoint", "other"])
def test_a_strength_other_than_that_of_the_roles_is_refused(declared, found):
    edits = {"training": {("data", "auxiliary", "start"): 0}, "disjoint": {}, "other": OTHER}
    values = edited(edits[found] | {("adversary", "auxiliary"): declared})
    if declared == found:
        assert made(values).adversary.auxiliary == found
        return
    with pytest.raises(InvalidParamsError) as caught:
        made(values)
    assert f"adversary.auxiliary is {declared!r}" in str(caught.value)
    assert str(caught.value).endswith(f"are {found!r}")


@pytest.mark.parametrize("role", ["train", "private"])
def test_only_the_attacker_has_another_dataset(role):
    with pytest.raises(InvalidParamsError, match=f"{role!r} comes from the protocol's own"):
        made(edited(OTHER | {("data", role, "dataset"): "cifar100"}))


@pytest.mark.parametrize(("own", "other"), [("cifar10", "cifar10"), ("./mine", "./mine/../mine/")])
def test_another_dataset_is_not_the_same_one_by_another_spelling(own, other):
    edits = {("data", "dataset"): own}
    edits |= {("data", role, "dataset"): other for role in ("auxiliary", "validation")}
    with pytest.raises(InvalidParamsError, match="names the protocol's own dataset"):
        made(edited(OTHER | edits))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("data", "train", "split"), "[t]rain", "of the form"),
        (("data", "train", "start"), 10**24, "< "),
        (("data", "private", "identity"), "all of them", "of the form"),
        (("data", "image_size"), 10**6, "<= 2048"),
        (("recipe", "crop"), 32, "images have 32 pixels"),
        (("threads",), 10**9, "<= 1024"),
    ],
)
def test_a_value_that_could_only_fail_later_is_refused_at_once(path, value, words):
    with pytest.raises(InvalidParamsError) as caught:
        made(edited({path: value}))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ssim_needs_images_as_large_as_its_window():
    small = {("data", "image_size"): 8, ("recipe", "crop"): 0, ("judge",): None}
    with pytest.raises(InvalidParamsError, match="ssim needs images of 11 pixels"):
        made(edited(small | {("metrics",): {"ssim": 1}}))
    assert made(edited(small | {("metrics",): {"psnr": 1}})).data.image_size == 8


def test_a_judge_needs_images_that_it_can_look_at():
    small = {("data", "image_size"): 7, ("recipe", "crop"): 0, ("metrics",): {"psnr": 1}}
    with pytest.raises(InvalidParamsError, match="a judge needs images of 8 pixels"):
        made(edited(small))
    with pytest.raises(InvalidParamsError, match=r"judge\.recipe\.crop is 32"):
        made(edited({("judge", "recipe", "crop"): 32}))


def test_metrics_and_judge_are_recorded_though_the_content_id_does_not_see_them():
    other = made(edited({("metrics",): {"mse": 1}, ("judge",): None}))
    assert other.content_id == made(FULL).content_id
    assert other.described() == made(FULL).described()
    assert other.recorded()["metrics"] == {"mse": 1}
    assert other.recorded()["judge"] is None
    again = build(Protocol, {**made(FULL).recorded(), "title": FULL["title"]}, "again")
    assert again.recorded() == made(FULL).recorded()


def test_another_judge_or_other_metrics_are_a_change_that_is_not_ranked():
    judge = load_protocol(RANKED).judge.model_dump(mode="json")
    weaker = altered(RANKED, judge=judge | {"width": 1})
    fewer = altered(RANKED, metrics={"psnr": 1})
    assert (weaker.changes, fewer.changes) == (["judge"], ["metrics"])
    assert not weaker.ranked
    assert not fewer.ranked
    assert weaker.content_id == fewer.content_id == load_protocol(RANKED).content_id


@pytest.mark.parametrize("name", released())
def test_every_released_protocol_has_a_judge_and_scores_that_ask_it(name):
    protocol = load_protocol(name)
    assert protocol.judge is not None
    assert protocol.metrics == METRICS
    if protocol.ranked:
        assert protocol.judge.gallery >= 1000


@pytest.mark.parametrize("role", ["auxiliary", "validation"])
def test_the_attackers_two_roles_come_from_one_dataset(role):
    with pytest.raises(InvalidParamsError, match="one attacker: same dataset"):
        made(edited(OTHER | {("data", role, "dataset"): None}))


def test_the_attackers_two_roles_are_disjoint_in_another_dataset_too():
    with pytest.raises(InvalidParamsError, match="'auxiliary' and 'validation' share images"):
        made(edited(OTHER | {("data", "validation", "start"): 109}))


def test_more_attacked_than_private_images_are_refused():
    with pytest.raises(InvalidParamsError, match="attacked is 11"):
        made(changed(("data", "attacked"), 11))


def test_how_many_private_images_an_interval_holds_is_not_known_before():
    by_hash = {"split": "test", "hashed": [0.0, 0.5]}
    edits = {("data", "private"): by_hash, ("data", "attacked"): 11}
    assert made(edited(edits)).data.private.count is None
    with pytest.raises(InvalidParamsError, match="attacked is 11"):
        made(edited(edits | {("data", "private"): by_hash | {"count": 10}}))


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


RANKED = next(name for name in released() if load_protocol(name).ranked)


def altered(name, **values):
    """A released protocol with some values replaced under its old id."""
    return made({**load_protocol(name).model_dump(mode="json"), **values})


def test_changes_name_what_differs_from_the_released_protocol():
    assert load_protocol(RANKED).changes == []
    seeds, batch = [41, 42], load_protocol(RANKED).batch + 1
    assert altered(RANKED, seeds=seeds).changes == ["seeds"]
    assert sorted(altered(RANKED, seeds=seeds, batch=batch).changes) == ["batch", "seeds"]


def test_a_released_protocol_that_was_altered_is_not_ranked():
    assert load_protocol(RANKED).ranked
    assert not altered(RANKED, seeds=[41, 42]).ranked


def test_a_title_or_an_estimate_is_no_change():
    same = altered(RANKED, title="in other words", minutes={"defense": 1000})
    assert same.changes == []
    assert same.ranked
    assert same.content_id == load_protocol(RANKED).content_id


def test_a_protocol_of_ones_own_has_no_changes_and_no_rank():
    mine = altered(RANKED, id="mine-v1", seeds=[41, 42])
    assert mine.changes == []
    assert not mine.ranked


def test_other_data_make_another_protocol_that_is_never_ranked():
    protocol = load_protocol(RANKED)
    data = DataRule(**{**dict(protocol.data), "dataset": "another"})
    moved = protocol.on(data)
    assert moved.data == data
    assert moved.model_dump(exclude={"data"}) == protocol.model_dump(exclude={"data"})
    assert moved.changes == ["data"]
    assert not moved.ranked
    assert moved.content_id != protocol.content_id
    assert protocol.on(protocol.data).content_id == protocol.content_id


def goldens():
    return {file.stem: file for file in add.FOLDER.glob("*.json")}


@pytest.mark.parametrize("name", sorted({*released(), *goldens()}))
def test_a_released_protocol_stays_as_it_is(name):
    assert name in goldens(), f"{name} is new: run `python tests/core/released/add.py`"
    assert name in released(), f"{name} is gone, but a released protocol stays"
    kept = json.loads(goldens()[name].read_text(encoding="utf-8"))
    found = add.changes(kept, load_protocol(name))
    assert not found, add.refusal(name, found)


def kept_of(protocol, edits=(), dropped=()):
    """A golden file as it could be from before a change."""
    kept = copy.deepcopy(add.golden(protocol))
    for path, value in dict(edits).items():
        at(kept["values"], path[:-1])[path[-1]] = value
    for path in dropped:
        del at(kept["values"], path[:-1])[path[-1]]
    return kept


def test_a_field_that_was_added_with_its_default_changes_no_released_protocol():
    assert add.changes(kept_of(made(FULL), dropped=DEFAULTS), made(FULL)) == []


def test_a_field_that_was_added_with_another_value_is_a_change():
    found = add.changes(kept_of(made(FULL), dropped=[("recipe", "clip")]), made(FULL))
    assert found == ["recipe.clip was null, is 1.0"]


def test_a_default_that_was_changed_is_a_change_though_the_id_is_the_same():
    found = add.changes(kept_of(made(FULL), edits={("recipe", "warmup"): 0.3}), made(FULL))
    assert found == ["recipe.warmup was 0.3, is 0.15"]


def test_a_field_that_was_removed_is_a_change():
    found = add.changes(kept_of(made(FULL), edits={("recipe", "gone"): 1}), made(FULL))
    assert len(found) == 1
    assert "recipe.gone" in found[0]


def test_a_default_of_an_attack_is_part_of_what_was_released():
    protocol = load_protocol(RANKED)
    kept = copy.deepcopy(add.golden(protocol))
    assert "lr" not in protocol.attacks["decoder"]
    kept["components"]["attack decoder"]["params"]["lr"] = 17
    (found,) = add.changes(kept, protocol)
    assert "attack decoder: lr was 17" in found


def test_a_new_version_of_a_method_is_a_change():
    protocol = load_protocol(RANKED)
    kept = copy.deepcopy(add.golden(protocol))
    kept["components"]["attack gradient"]["version"] += 1
    assert len(add.changes(kept, protocol)) == 1


def test_another_way_to_hash_is_a_change():
    kept = {**kept_of(made(FULL)), "content": "0123456789abcdef"}
    assert len(add.changes(kept, made(FULL))) == 1


def test_new_protocols_are_added_and_old_ones_never_overwritten(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(add.protocols_page.BEGIN, encoding="utf-8")
    assert add.add(tmp_path, page) == released()
    assert add.add(tmp_path, page) == []
    assert all(f"### {name}\n" in page.read_text(encoding="utf-8") for name in released())
    file = tmp_path / f"{RANKED}.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept["values"]["seeds"] = [41, 42]
    file.write_text(json.dumps(kept), encoding="utf-8")
    successor = RANKED.replace("-v1", "-v2")
    with pytest.raises(SystemExit, match=f"{RANKED} changed .*release {successor} instead"):
        add.add(tmp_path, page)
    assert json.loads(file.read_text(encoding="utf-8")) == kept
