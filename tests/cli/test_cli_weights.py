"""--weights: a trained defense from a folder, or one line that says why not."""

import json
import shutil

import pytest
from cli_words import PAIR

from mibench.record import read_record


@pytest.fixture
def trained(finished, tmp_path):
    """The trained defense of a run, copied to where a user might have carried it."""
    key = finished.record.defense_facts["artifact"]
    folder = tmp_path / "carried" / key
    shutil.copytree(finished.cache / "defense" / key, folder)
    return folder


def test_given_weights_are_used_and_said(invoke, finished, trained):
    done = invoke(*PAIR, "--weights", trained, "--out", "again")
    assert done.exit_code == 0, done.output
    record = read_record(trained.parent.parent / "again")
    assert record.defense_facts["artifact"] == trained.name
    assert record.scores == finished.record.scores
    assert any(f"weights given by hand ({trained.name})" in one for one in record.deviations)
    assert not record.protocol.ranked


def test_weights_of_another_parameter_set_are_refused(refused, trained):
    line = refused(*PAIR, "--weights", trained, "--set", "defense.leakage=0.5", "--dry-run")
    assert "was trained with params leakage = 0.3, and this job has 0.5" in line


def test_weights_of_another_defense_are_refused(refused, trained):
    words = ["noise" if word == "privdfs" else word for word in PAIR]
    assert 'was trained with defense = "privdfs"' in refused(*words, "--weights", trained)


def test_weights_of_another_architecture_are_refused(refused, trained):
    place = trained / "artifact.json"
    values = json.loads(place.read_text())
    values["spec"]["backbone"]["params"]["stem"] = 99
    place.write_text(json.dumps(values))
    line = refused(*PAIR, "--weights", trained, "--dry-run")
    assert "was trained with backbone params" in line
    assert "99" in line


@pytest.mark.parametrize("damage", ["missing", "cut", "no json"])
def test_what_is_no_whole_artifact_is_refused(refused, trained, damage):
    if damage == "missing":
        shutil.rmtree(trained)
    elif damage == "cut":
        place = trained / "tensors.safetensors"
        place.write_bytes(place.read_bytes()[:-8])
    else:
        (trained / "artifact.json").write_text("{")
    line = refused(*PAIR, "--weights", trained, "--dry-run")
    assert str(trained) in line


def test_an_artifact_of_another_kind_is_refused(refused, finished):
    folder = next(path for path in (finished.cache / "decoder").iterdir() if path.is_dir())
    assert "holds a trained decoder, not a defense" in refused(*PAIR, "--weights", folder)


def test_weights_trained_on_other_images_are_refused(refused, trained):
    place = trained / "artifact.json"
    values = json.loads(place.read_text())
    values["spec"]["train"] = "0123456789abcdef"
    place.write_text(json.dumps(values))
    assert "trained on other images" in refused(*PAIR, "--weights", trained)


def test_the_name_of_a_component_is_a_root(invoke, refused):
    done = invoke(*PAIR, "--set", "privdfs.leakage=0.5", "--dry-run")
    assert done.exit_code == 0, done.output
    assert "privdfs with leakage=0.5" in done.output
    twice = refused(*PAIR, "--set", "privdfs.leakage=1", "--set", "defense.leakage=2")
    assert "set the same key" in twice
