"""``mibench prior train``: the prior where the attacks find it, a copy, and a sheet of samples."""

import json

import pytest
from cli_words import TINY
from PIL import Image

from mibench.artifacts import ArtifactStore
from mibench.attacks.diffusion.pretrained import load
from mibench.protocol import load_protocol

TRAIN = ("prior", "train", "--protocol", TINY)
RUN = ("run", "--defense", "none", "--attack", "diffusion", "--protocol", TINY)


def kept(kind):
    return sorted(one.name for one in (ArtifactStore().root / kind).iterdir() if one.is_dir())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("mibench.cli.prior.SAMPLES", 4)


def test_the_attack_finds_the_trained_prior(invoke, quick, tmp_path):
    done = invoke(*TRAIN, "--out", tmp_path / "prior")
    assert done.exit_code == 0, done.output
    (key,) = kept("prior")
    assert f"{ArtifactStore().root / 'prior' / key}" in done.stdout
    notes = json.loads((tmp_path / "prior" / "prior.json").read_text())
    assert f"Validation loss: {notes['validation_loss']:.4f}" in done.stdout
    assert notes["params"]["steps"] == 10
    assert "256 auxiliary images of tiny-test (procedural" in notes["saw"]
    assert {one.name for one in (tmp_path / "prior").iterdir()} == {
        "prior.json", "samples.png", "unet", "scheduler",
    }  # fmt: skip
    assert Image.open(tmp_path / "prior" / "samples.png").size == (2 * 68 + 4, 2 * 68 + 4)
    _, facts = load(str(tmp_path / "prior"), (3, 32, 32))
    assert facts["saw"] == notes["saw"]

    done = invoke(*RUN, "--out", tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert f"reused prior {key[:8]}" in done.stdout
    assert kept("prior") == [key]


def test_the_folder_can_be_named_as_a_prior(invoke, quick, tmp_path):
    assert invoke(*TRAIN, "--out", tmp_path / "prior").exit_code == 0
    done = invoke(*RUN, "--set", f"attack.prior.pretrained={tmp_path / 'prior'}", "--out", "run")
    assert done.exit_code == 0, done.output
    facts = json.loads((tmp_path / "run" / "record.json").read_text())["attack_facts"]["prior"]
    assert facts["source"] == str(tmp_path / "prior")
    assert "auxiliary images of tiny-test" in facts["saw"]


def test_by_default_the_files_lie_beside_the_runs(invoke, quick, tmp_path):
    done = invoke(*TRAIN, "--seed", 3, "--set", "prior.steps=2")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "runs" / "tiny-test" / "prior-s3"
    assert json.loads((folder / "prior.json").read_text())["params"]["steps"] == 2


def test_a_killed_training_goes_on(invoke, quick, monkeypatch, tmp_path):
    import mibench.training

    real = mibench.training._Run.average_in
    state = {"left": 4, "done": []}

    def killed(*args):
        state["left"] -= 1
        if state["left"] == 0:
            raise KeyboardInterrupt
        state["done"].append(args[-1])
        real(*args)

    # A checkpoint is due at every step.
    monkeypatch.setattr("mibench.artifacts.Checkpoint.due", lambda self: True)
    whole = invoke(*TRAIN, "--out", "whole", env={"MIBENCH_CACHE": str(tmp_path / "other")})
    assert whole.exit_code == 0, whole.output
    monkeypatch.setattr("mibench.training._Run.average_in", killed)
    first = invoke(*TRAIN, "--out", "resumed")
    assert first.exit_code == 130
    assert "the same command goes on" in first.stderr
    assert not (tmp_path / "resumed" / "prior.json").exists()
    second = invoke(*TRAIN, "--out", "resumed")
    assert second.exit_code == 0, second.output
    assert "going on from step 3" in second.stdout
    assert state["done"] == list(range(10))
    weights = "unet/diffusion_pytorch_model.safetensors"
    one, two = ((tmp_path / name / weights).read_bytes() for name in ("whole", "resumed"))
    assert one == two


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "prior.stps=3"), "did you mean 'steps'"),
        (("--set", "attack.steps=3"), "unknown root"),
        (("--set", "prior.pretrained=google/ddpm-cifar10-32"), "not trained"),
        (("--set", "prior.patch=3"), "images of 32 pixels"),
        (("--protocol", "cifar10-lite"), "cifar10-lite-v1"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_bad_input_is_one_line(refused, words, said):
    assert said in refused(*TRAIN, *words)


def test_it_trains_what_the_protocol_says(invoke, quick):
    assert invoke(*TRAIN, "--out", "out").exit_code == 0
    (key,) = kept("prior")
    place = ArtifactStore().root / "prior" / key / "artifact.json"
    spec = json.loads(place.read_text())["spec"]
    wanted = load_protocol(TINY).attacks["diffusion"]["prior"]
    assert {name: spec["params"][name] for name in wanted} == wanted
