"""Records: what is written is what is read, and what is wrong is refused."""

import json

import pytest
from pydantic import ValidationError

from mibench.errors import RecordError
from mibench.provenance import package_version, provenance, revision
from mibench.record import (
    CONTROLS,
    ESSENTIAL,
    FORMAT,
    AdversaryFacts,
    Component,
    Cost,
    DataFacts,
    ProtocolId,
    Record,
    Score,
    read_record,
)


def score(**changes):
    values = {
        "metric": "psnr", "version": 1, "unit": "dB", "higher_is_better": True,
        "value": 12.5, "ci_low": 12.0, "ci_high": 13.0, "n": 8,
    }  # fmt: skip
    return Score(**(values | changes))


def of_leakage(one):
    return one.model_copy(update={"metric": f"leakage({one.metric})"})


def record(**changes):
    scores = changes.get("scores", [score()])
    changes = {
        **dict.fromkeys(CONTROLS, scores),
        "leakage": [of_leakage(s) for s in scores],
    } | changes
    part = Component(name="none", version=1, code="00", params={"a": [1, 2.5, None]})
    values = {
        "status": "success",
        "protocol": ProtocolId(id="toy-v1", content="ff", track="test", ranked=False),
        "defense": part,
        "attack": part,
        "backbone": part,
        "seed": 0,
        "deviations": [],
        "started": "2030-01-01T00:00:00+00:00",
        "data": DataFacts(
            dataset="toy", image_size=16, images={"attacked": 8}, identities={}, left_out={}
        ),
        "manifest": "00",
        "adversary": AdversaryFacts(knowledge="white_box", corrupted=[0], screening={}),
        "scores": [score()],
        "utility": [score(metric="accuracy")],
        "cost": Cost(
            client_parameters=1,
            client_flops=1,
            undefended_client_flops=1,
            bytes_up=4,
            bytes_down=4,
            values_per_server=[1],
            image_values=1,
        ),
        "provenance": {"mibench": "0", "packages": {"torch": None}},
    }
    return Record(**(values | changes))


def written(folder, values):
    path = folder / "record.json"
    path.write_text(json.dumps(values))
    return path


def test_a_record_comes_back_as_it_was(tmp_path):
    made = record()
    (tmp_path / "record.json").write_bytes(made.to_json())
    for path in (tmp_path, tmp_path / "record.json"):
        again = read_record(path)
        assert again == made
        assert again.id == made.id
        assert again.to_json() == made.to_json()
    assert made.to_json().endswith(b"}\n")


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"status": "started"},
        {"error": "stopped"},
        {"scores": [score(value=12.500001)]},
        {"scores": [score(), score(metric="mse")]},
        {"deviations": ["attack.steps set by hand"]},
        {"started": "2030-01-01T00:00:01+00:00"},
        {"provenance": {"mibench": "1"}},
        {"wall_seconds": 1.5},
    ],
    ids=str,
)
def test_the_id_follows_the_content(changes):
    assert record(**changes).id != record().id
    assert record(**changes).id == record(**changes).id


def test_a_newer_format_is_refused(tmp_path):
    values = json.loads(record().to_json()) | {"format_version": FORMAT + 1}
    with pytest.raises(RecordError, match="install a newer mibench") as caught:
        read_record(written(tmp_path, values))
    assert str(FORMAT + 1) in str(caught.value)


def test_an_unknown_field_is_refused_wherever_it_is(tmp_path):
    for path in ((), ("protocol",), ("scores", 0), ("defense",)):
        values = json.loads(record().to_json())
        inner = values
        for step in path:
            inner = inner[step]
        inner["surprise"] = 1
        with pytest.raises(RecordError, match="surprise"):
            read_record(written(tmp_path, values))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_only_finite_numbers_are_recorded(tmp_path, value):
    with pytest.raises(ValidationError):
        score(value=value)
    with pytest.raises(ValidationError):
        record(wall_seconds=value)
    values = json.loads(record().to_json())
    values["scores"][0]["value"] = value
    with pytest.raises(RecordError):
        read_record(written(tmp_path, values))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_only_finite_numbers_stand_in_free_facts(tmp_path, value):
    values = json.loads(record().to_json())
    values["provenance"]["speed"] = {"a": [value]}
    with pytest.raises(RecordError):
        read_record(written(tmp_path, values))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "{}", '{"format_version": "1"}', '{"format_version": 1}'], ids=repr
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(RecordError) as caught:
        read_record(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_and_a_missing_record_are_refused(tmp_path):
    with pytest.raises(RecordError, match="no record at"):
        read_record(tmp_path / "nowhere")
    with pytest.raises(RecordError, match="no record at"):
        read_record(tmp_path)
    (tmp_path / "record.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(RecordError):
        read_record(tmp_path)


@pytest.mark.parametrize("field", ESSENTIAL)
def test_a_result_without_its_controls_is_no_record(tmp_path, field):
    values = json.loads(record().to_json())
    for empty in ({field: None}, {field: []}):
        if isinstance(values[field], list) == (empty[field] == []):
            with pytest.raises(RecordError, match=field):
                read_record(written(tmp_path, values | empty))
    # What did not finish, and what an older version wrote, has fewer fields.
    for other in ({"status": "error"}, {"format_version": 3}):
        lacking = values | other
        lacking[field] = type(values[field])() if isinstance(values[field], list) else None
        assert read_record(written(tmp_path, lacking)).status == lacking["status"]


@pytest.mark.parametrize("control", [*CONTROLS, "leakage"])
@pytest.mark.parametrize("wrong", ["another metric", "one more", "in another order"])
def test_controls_follow_the_scores(control, wrong):
    both = [score(), score(metric="mse")]
    row = [of_leakage(one) for one in both] if control == "leakage" else both
    changed = {
        "another metric": [row[0], row[0]],
        "one more": [*row, row[0]],
        "in another order": row[::-1],
    }[wrong]
    assert record(scores=both, **{control: row})
    with pytest.raises(ValidationError, match=control):
        record(scores=both, **{control: changed})


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("changes", [{"n": 7}, {"value": None, "reason": "lost"}], ids=str)
def test_controls_are_of_the_same_images(control, changes):
    with pytest.raises(ValidationError, match=f"{control} of psnr"):
        record(**{control: [score(**changes)]})


def test_a_record_cannot_be_changed():
    with pytest.raises(ValidationError):
        record().seed = 3


def test_provenance_can_be_recorded_and_names_the_versions():
    facts = provenance("cpu", 2)
    made = record(provenance=facts)
    assert json.loads(made.to_json())["provenance"]["packages"]["torch"] == package_version("torch")
    assert facts["threads"] == 2
    assert facts["device"].startswith("cpu")
    assert package_version("no-such-distribution-here") is None
    found = revision()
    assert found is None or (len(found["commit"]) == 40 and isinstance(found["dirty"], bool))
