"""`mibench challenge` as a maintainer meets it."""

import json
import re
import shutil

import pytest
from cli_words import TINY
from typer.testing import CliRunner

from mibench.cli import app
from mibench.record import read_record


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A run, and its challenge as the command line writes it."""
    folder = tmp_path_factory.mktemp("challenge")
    pair = ("run", "--defense", "noise", "--attack", "linear", "--protocol", TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIBENCH_CACHE", str(folder / "cache"))
        done = CliRunner().invoke(app, [*pair, "--out", str(folder / "run")])
        assert done.exit_code == 0, done.output
        record = read_record(folder / "run")
        shutil.copytree(folder / "run", folder / "v1" / "records" / record.id)
        words = ["challenge", "export", "noise", "--protocol", TINY, "--root", str(folder / "v1")]
        done = CliRunner().invoke(app, [*words, "--out", str(folder / "challenge")])
    assert done.exit_code == 0, done.output
    (folder / "said.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def place(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "place")


def one_line(text):
    return " ".join(text.split())


def score(place, images, name="mine", *more):
    words = ("challenge", "score", place / "challenge", "--reconstructions", images)
    return (*words, "--name", name, "--root", place / "v1", *more)


def test_an_export_says_what_it_is(exported):
    said, record = one_line((exported / "said.txt").read_text()), read_record(exported / "run")
    assert f"8 images behind noise, record {record.id} (linear)" in said
    assert re.search(r"Granted: \d+ tensors of the trained model; withheld: \d+", said)
    names = {path.name for path in (exported / "challenge").iterdir()}
    assert names == {"challenge.yaml", "shares.safetensors", "weights.safetensors", "README.md"}
    told = (exported / "challenge" / "README.md").read_text()
    assert "`0000.png` to `0007.png`" in told
    assert record.id in told


def test_the_runs_own_images_get_the_runs_own_scores(invoke, place):
    words = ("--author", "A", "--author", "B", "--title", "T", "--paper", "P", "--code", "C")
    result = invoke(*score(place, place / "run" / "reconstructions", "mine", *words))
    assert result.exit_code == 0, result.output
    record = read_record(place / "run")
    best = json.loads((place / "v1" / "best-known" / "mine.json").read_text())
    assert best["scores"] == [one.model_dump(mode="json") for one in record.scores]
    assert best["permuted"] == [one.model_dump(mode="json") for one in record.permuted]
    assert best["leakage"] == [one.model_dump(mode="json") for one in record.leakage]
    assert (best["record"], best["level"], best["by"]) == (record.id, "rescored", "mine")
    origin = best["origin"]
    assert (origin["authors"], origin["title"]) == (["A", "B"], "T")
    assert (origin["paper"], origin["code"]) == ("P", "C")
    assert "it is shown and decides no rank" in one_line(result.stdout)
    assert "passed: challenge-private" in result.stdout


def test_the_record_may_be_named_by_its_run(invoke, place):
    shutil.rmtree(place / "v1")
    images = place / "run" / "reconstructions"
    assert "error: no record at" in invoke(*score(place, images)).stderr
    result = invoke(*score(place, images, "mine", "--record", place / "run"))
    assert result.exit_code == 0, result.output


def test_private_images_end_with_1_and_are_not_written(invoke, place):
    from mibench.challenge import open_challenge, save_reconstructions
    from mibench.data.roles import load_roles

    protocol = open_challenge(place / "challenge").protocol
    originals = load_roles(protocol.data, None, place / "cache").attacked.images()
    save_reconstructions(originals, place / "looked-up")
    result = invoke(*score(place, place / "looked-up"))
    assert result.exit_code == 1, result.output
    assert "failed: challenge-private: 8 of 8 are private images, pixel for pixel" in result.stdout
    assert not (place / "v1" / "best-known").exists()


def test_all_that_is_wrong_with_images_is_one_line(refused, place):
    images = place / "run" / "reconstructions"
    (images / "0001.png").unlink()
    (images / "0002.png").write_text("no picture")
    (images / "notes.txt").touch()
    told = refused(*score(place, images))
    for words in ("notes.txt is not asked for", "0001.png is missing", "0002.png is no readable"):
        assert words in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("noice", "--protocol", TINY), "did you mean 'noise'"),
        (("noise", "--protocol", "nothing-v1"), "unknown protocol 'nothing-v1'"),
        (("noise", "--protocol", TINY, "--set", "snr_db=3"), "expected root.key=value"),
        (("noise", "--protocol", TINY, "--set", "attack.steps=3"), "attack"),
        (("noise", "--protocol", TINY, "--set", "defense.snr=3"), "snr"),
        (("none", "--protocol", TINY), "protects nothing"),
        (("noise", "--protocol", TINY), "add one first, or name a run with --record"),
    ],
)
def test_exports_that_cannot_be_made(refused, tmp_path, words, told):
    assert told in refused("challenge", "export", *words, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_second_export_does_not_overwrite(refused, place):
    words = ("challenge", "export", "noise", "--protocol", TINY, "--root", place / "v1")
    assert "is not empty" in refused(*words, "--out", place / "challenge")


def test_a_name_is_used_once(invoke, refused, place):
    images = place / "run" / "reconstructions"
    assert invoke(*score(place, images)).exit_code == 0
    assert "is there already" in refused(*score(place, images))
    assert "--name" in refused(*score(place, images, "../mine"))
