"""`mibench reproduce` and `mibench rescore` as a user meets them."""

import json
import shutil

import pytest
from cli_words import TINY
from typer.testing import CliRunner

from mibench.cli import app
from mibench.cli.run import estimate_minutes
from mibench.outputs import WEIGHTS
from mibench.params import build
from mibench.protocol import Protocol, load_protocol
from mibench.record import read_record


@pytest.fixture(scope="session")
def finished_linear(tmp_path_factory):
    """One real run that takes a moment."""
    folder = tmp_path_factory.mktemp("linear")
    words = ("run", "--defense", "noise", "--attack", "linear", "--protocol", TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIBENCH_CACHE", str(folder / "cache"))
        done = CliRunner().invoke(app, [*words, "--out", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return folder / "run"


@pytest.fixture
def run(finished_linear, tmp_path):
    return shutil.copytree(finished_linear, tmp_path / "run")


def edit(folder, change):
    values = json.loads((folder / "record.json").read_text())
    change(values)
    (folder / "record.json").write_text(json.dumps(values))


def one_line(text):
    return " ".join(text.split())


def test_a_run_comes_out_again_trained_anew(invoke, run, tmp_path):
    result = invoke("reproduce", run)
    assert result.exit_code == 0, result.output
    assert "IDENTICAL: every value of every image" in result.stdout
    assert "Everything is trained anew" in one_line(result.stdout)
    again = tmp_path / "run-again"
    assert read_record(again).scores == read_record(run).scores
    assert not (again / "cache").exists()
    assert not (tmp_path / "cache" / "defense").exists()  # the user's own stays as it is


def test_an_edited_record_exits_with_1_and_says_where(invoke, run):
    edit(run, lambda v: v["scores"][1].update(value=v["scores"][1]["value"] + 3))
    result = invoke("reproduce", run / "record.json", "--cached", "--out", "elsewhere")
    assert result.exit_code == 1, result.output
    assert "DIFFERENT" in result.stdout
    assert "First difference, record: scores says that psnr is" in one_line(result.stdout)
    assert "this proves nothing of their training" in one_line(result.stdout)


def test_another_seed_says_what_its_intervals_cover(invoke, run, tmp_path):
    result = invoke("reproduce", run, "--seed", "4")
    assert result.exit_code in (0, 1), result.output
    assert "IDENTICAL" not in result.stdout
    assert "it covers images, not training runs" in one_line(result.stdout)
    assert read_record(tmp_path / "run-again-s4").seed == 4


def test_other_data_end_it_before_anything_is_trained(invoke, run, tmp_path):
    edit(run, lambda v: v["data"]["identities"].update(train="0123456789abcdef"))
    result = invoke("reproduce", run)
    assert result.exit_code == 1, result.output
    assert "First difference, data: the role 'train' holds other images" in one_line(result.stdout)
    assert not (tmp_path / "run-again" / "record.json").exists()


def of_cifar(values):
    """A record of another dataset, whole in itself."""
    chosen = values["protocol"]["values"]
    chosen["data"]["dataset"] = "cifar10"
    for role in ("train", "auxiliary", "validation", "private"):
        chosen["data"][role]["split"] = "test" if role == "private" else "train"
    found = build(Protocol, {**chosen, "title": ""}, "test")
    values["protocol"]["content"] = found.content_id


@pytest.mark.parametrize("command", ["reproduce", "rescore"])
def test_without_data_it_says_so(refused, run, command):
    edit(run, of_cifar)
    assert "cifar10" in refused(command, run)


@pytest.mark.parametrize("command", ["reproduce", "rescore"])
def test_nothing_is_overwritten(refused, run, tmp_path, command):
    other = shutil.copytree(run, tmp_path / "other")
    before = (other / "record.json").read_bytes()
    assert "holds a record already" in refused(command, run, "--out", other)
    assert "holds a record already" in refused(command, run, "--out", run)
    assert (other / "record.json").read_bytes() == before


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("extra", lambda v: v.update(extra=1)),
        ("seed", lambda v: v.pop("seed")),
        ("it was edited", lambda v: v["protocol"].update(id="cifar10-lite-v1")),
        ("error", lambda v: v.update(status="error", error="x")),
        ("format version 99", lambda v: v.update(format_version=99)),
    ],
)
@pytest.mark.parametrize("command", ["reproduce", "rescore"])
def test_a_broken_record_is_one_line(refused, run, tmp_path, command, said, change):
    edit(run, change)
    before = sorted(tmp_path.iterdir())
    assert said in refused(command, run)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", ["reproduce", "rescore"])
def test_a_folder_that_is_not_there_is_one_line(refused, command):
    assert "nowhere" in refused(command, "nowhere")


def test_a_run_is_scored_anew(invoke, run, tmp_path):
    result = invoke("rescore", run)
    assert result.exit_code == 0, result.output
    assert "psnr: computed from the images; no image's value has moved by more than 0" in (
        one_line(result.stdout)
    )
    new, old = read_record(tmp_path / "run-rescored"), read_record(run)
    assert new.supersedes == old.id
    assert new.scores == old.scores


def test_a_run_that_is_scored_anew_keeps_its_trained_defense(invoke, run, tmp_path):
    (run / WEIGHTS).mkdir()
    (run / WEIGHTS / "tensors.safetensors").write_bytes(b"as they were")
    result = invoke("rescore", run)
    assert result.exit_code == 0, result.output
    kept = tmp_path / "run-rescored" / WEIGHTS / "tensors.safetensors"
    assert kept.read_bytes() == b"as they were"


def test_missing_reconstructions_are_one_line(refused, run):
    (run / "reconstructions" / "0002.png").unlink()
    assert "lacks 1 of 8 images, from 0002.png on" in refused("rescore", run)


# --- every coalition -----------------------------------------------------------------------------


def test_every_coalition_multiplies_the_estimate():
    protocol = load_protocol("cifar10-lite-v1")
    once = estimate_minutes(protocol, "privdfs", "decoder")
    assert estimate_minutes(protocol, "privdfs", "decoder", 4) == once + 3 * 2
    assert estimate_minutes(protocol, "none", "decoder", 1) == 5 + 2 + 2 + 4


def test_the_plan_names_the_coalitions(invoke):
    words = ("run", "--defense", "privdfs", "--attack", "decoder", "--protocol", TINY, "--dry-run")
    result = invoke(*words, "--every-coalition", "--set", "protocol.adversary.coalition=2")
    assert result.exit_code == 0, result.output
    text = one_line(result.stdout)
    assert "each of 6 coalitions in turn" in text
    assert "every coalition attacks, not only the worst by the screening" in text
    assert "coalitions in turn" not in invoke(*words).stdout


def test_every_coalition_is_another_run(invoke, refused, tmp_path):
    words = ("run", "--defense", "privdfs", "--attack", "linear", "--protocol", TINY)
    first = invoke(*words, "--every-coalition", "--out", "run")
    assert first.exit_code == 0, first.output
    assert "in turn the servers 0 or 1 or 2 or 3" in one_line(first.stdout)
    assert (tmp_path / "run" / "linear@3" / "record.json").exists()
    assert "holds the record of another run" in refused(*words, "--out", "run")
