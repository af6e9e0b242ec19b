"""From a new folder to the highest level, and what stands in the way of runs that were edited."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest
import torch
from forged_runs import read, reckon
from PIL import Image
from safetensors.torch import load_file, save_file
from submission_runs import TINY, made
from typer.testing import CliRunner

import mibench.checks.attack
import mibench.checks.defense
from mibench.artifacts import ArtifactStore
from mibench.board import entries
from mibench.board.model import Level
from mibench.checks import targets
from mibench.checks.record_numbers import attacked_images
from mibench.checks.record_run import Run
from mibench.checks.trial import MAPS
from mibench.cli import app
from mibench.errors import BoardError, SubmissionError
from mibench.outputs import RECONSTRUCTIONS
from mibench.record import read_record
from mibench.registry import metrics
from mibench.submission import score as scoring
from mibench.submission import verify as verifying
from mibench.submission.verify import verify

# Whole runs in the sandbox, each half a minute on a machine with nothing else to do.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


def quick(nursery, target, params, progress):
    """A part of the battery, which has tests of its own."""
    if target.kind == "defense":
        return mibench.checks.defense.check_defense(
            nursery, target.name, params, settings=[MAPS], only=["wire-shares", "learns"]
        )
    return mibench.checks.attack.check_attack(nursery, target.name, params, only=["attack-output"])


@pytest.fixture
def unchecked(monkeypatch):
    """Leaves the battery out, where a test is about something else."""
    monkeypatch.setattr(verifying, "battery", lambda *_: ([], "not run in this test"))


@dataclass
class Scored:
    folder: Path
    run: Path
    store: ArtifactStore
    said: list


def scored(place, kind="defense", name="channel-noise", **options):
    """A new submission with its first run."""
    folder = made(place, name, kind)
    said = []
    (run, *_) = scoring.score(folder, place / "runs", None, say=said.append, **options)
    return Scored(folder, run, ArtifactStore(place / "cache"), said)


@pytest.fixture(scope="session")
def honest(tiny, tmp_path_factory):
    """A submission with one run, scored once for all tests; copy it before you change it."""
    return scored(tmp_path_factory.mktemp("honest"), attack="linear")


@pytest.fixture
def copy(honest, tmp_path):
    """A submission with one run that a test may change."""
    folder = shutil.copytree(honest.folder, tmp_path / "submissions" / honest.folder.name)
    return Scored(folder, shutil.copytree(honest.run, tmp_path / "run"), honest.store, [])


def take(one, root, level, **options):
    return verify(one.folder, one.run, root, Level(level), None, one.store, **options)


def refused(one, root, level):
    with pytest.raises(SubmissionError) as caught:
        take(one, root, level)
    return caught.value.lines


def lines_of(verification):
    return {line.check: line for line in verification.checks}


@pytest.fixture(scope="session")
def lifted(honest, tmp_path_factory):
    """A leaderboard with the honest run, rescored."""
    root = tmp_path_factory.mktemp("lifted") / "v1"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(targets, "run", quick)
        take(honest, root, "rescored")
    return root


def test_two_levels_say_what_was_checked(honest, lifted):
    entry = entries.read_entry(lifted, read_record(honest.run).id)
    assert [one.level for one in entry.verifications] == ["claimed", "claimed", "rescored"]
    arithmetic, claimed, rescored = map(lines_of, entry.verifications)
    assert arithmetic["record-means"].verdict == "passed"
    assert {"submission", "code", "wire-shares", "learns"} <= set(claimed)
    assert all(line.verdict == "passed" for line in rescored.values()), rescored
    assert {"rescored-scores", "weights", "accuracy", "cost", "outside-attack",
            "undefended-accuracy", "undefended-attack"} <= set(rescored)  # fmt: skip
    assert entry.origin.submission == "channel-noise"
    assert entry.origin.authors == ["Ada L."]


def test_the_third_level_runs_it_again_in_the_sandbox(honest, lifted, tmp_path):
    root = shutil.copytree(lifted, tmp_path / "v1")
    said = []
    entry = take(honest, root, "reproduced", seed=7, out=tmp_path / "again", say=said.append)
    assert entry.level is Level.REPRODUCED
    assert entries.read_entry(root, entry.record) == entry
    last = entry.verifications[-1]
    assert (last.verdict, last.seed) == ("same", 7)
    assert "the network" in lines_of(last)["isolation"].found
    assert lines_of(last)["weights"].verdict == "passed"
    assert lines_of(last)["outside-attack"].found.startswith("our own decoder attack on its")
    assert [one for one in said if "already" in one] == [
        "claimed: reached already, nothing to do", "rescored: reached already, nothing to do"
    ]  # fmt: skip
    # Nothing is done twice.
    assert take(honest, root, "reproduced") == entry


def test_the_run_keeps_images_and_weights_and_no_cache(honest):
    inside = {path.name for path in honest.run.iterdir()}
    assert {"record.json", "per_image.parquet", RECONSTRUCTIONS, "weights"} <= inside
    assert "cache" not in inside
    assert any(one.startswith("In the sandbox, the kernel kept it from") for one in honest.said)
    record = read_record(honest.run)
    assert record.defense.location == "submissions/channel-noise/defense.py:ChannelNoise"


def test_a_finished_run_is_not_made_again(honest):
    said = []
    again = scoring.score(honest.folder, honest.run.parents[1], None, attack="linear",
                          say=said.append)  # fmt: skip
    assert again == [honest.run]
    assert said == [f"{honest.run}: there already"]


def test_an_edited_record_reaches_no_level(copy, tmp_path, unchecked):
    values = read(copy.run)
    values["scores"][1]["value"] -= 3
    (copy.run / "record.json").write_text(json.dumps(values))
    lines = refused(copy, tmp_path / "v1", "claimed")
    assert any(line.startswith("claimed: record-means: ") for line in lines), lines
    with pytest.raises(BoardError):
        entries.read_entry(tmp_path / "v1", read_record(copy.run).id)


def hide(run):
    """Puts the mean image in place of all reconstructions, in pictures and numbers alike."""
    record = read_record(run)
    for path in (run / RECONSTRUCTIONS).glob("*.png"):
        shutil.copy(run / "guesses" / "mean-image.png", path)
    originals = attacked_images(Run(run, record, None, None, None, run.parent / "decoded"))
    with Image.open(run / "guesses" / "mean-image.png") as image:
        data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    grey = data.view(32, 32, 3).permute(2, 0, 1).float().div(255).expand_as(originals)
    table = pd.read_parquet(run / "per_image.parquet")
    for name in ("mse", "psnr", "ssim"):
        table[name] = metrics.load(name)()(grey, originals).numpy()
    reckon(run, read(run), table)


def test_hidden_leakage_is_found_from_outside(copy, tmp_path, unchecked):
    """Every number follows from the pictures, and the pictures do not show what leaks."""
    hide(copy.run)
    assert take(copy, tmp_path / "v1", "claimed").level is Level.CLAIMED
    lines = refused(copy, tmp_path / "v1", "rescored")
    assert len(lines) == 1, lines
    assert lines[0].startswith("rescored: outside-attack: our own linear attack on its messages")


def test_a_spoilt_decoder_is_found_before_anything_is_run_again(tiny, tmp_path, unchecked):
    """The quick attack from outside cannot tell, for a decoder may honestly be the weaker one."""
    one = scored(tmp_path, attack="decoder")
    hide(one.run)
    entry = take(one, tmp_path / "v1", "rescored")
    assert lines_of(entry.verifications[-1])["outside-attack"].verdict == "warned"
    (line,) = refused(one, tmp_path / "v1", "reproduced")
    assert line.startswith("reproduced: outside-attack: our own decoder attack on its messages")
    assert list(one.run.parent.glob("*/record.json")) == [one.run / "record.json"]


def test_other_pictures_are_found_by_scoring_them(copy, tmp_path, unchecked):
    take(copy, tmp_path / "v1", "claimed")
    path = copy.run / RECONSTRUCTIONS / "0000.png"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    lines = refused(copy, tmp_path / "v1", "rescored")
    assert any("record-files" in line for line in lines)
    assert any("rescored-scores" in line for line in lines)


def test_other_weights_are_found(copy, tmp_path, unchecked):
    path = next((copy.run / "weights").glob("*.safetensors"))
    tensors = load_file(path)
    name = max(tensors, key=lambda one: tensors[one].numel())
    save_file({**tensors, name: tensors[name] + 1}, path)
    (line,) = refused(copy, tmp_path / "v1", "rescored")
    assert "does not match its checksum" in line


def test_a_wrong_accuracy_is_found(copy, tmp_path, unchecked):
    values = read(copy.run)
    for one in values["utility"]:
        if one["metric"] == "accuracy":
            one |= {"value": 0.875, "ci_low": 0.8, "ci_high": 0.95}
    (copy.run / "record.json").write_text(json.dumps(values))
    lines = refused(copy, tmp_path / "v1", "rescored")
    assert any(line.startswith("rescored: accuracy: ") for line in lines), lines


def test_a_run_without_weights(copy, tmp_path, unchecked):
    shutil.rmtree(copy.run / "weights")
    (line,) = refused(copy, tmp_path / "v1", "rescored")
    assert "weights" in line


def test_code_that_was_edited_after_the_run(copy, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "run", lambda *_: [])
    path = copy.folder / "defense.py"
    path.write_text(path.read_text() + "\nX = 1\n")
    (line,) = refused(copy, tmp_path / "v1", "claimed")
    assert line.startswith("claimed: code: the code is ")


def test_a_run_of_something_else(copy, tmp_path, unchecked):
    path = copy.folder / "submission.yaml"
    text = path.read_text().replace("seeds: [0]", "seeds: [3]")
    path.write_text(text.replace("params: {}", "params: {deviation: 0.7}"))
    lines = refused(copy, tmp_path / "v1", "claimed")
    assert any("ran with seed 0" in line for line in lines)
    assert any("deviation = 0.5, and submission.yaml says 0.7" in line for line in lines)


def test_a_folder_with_problems_is_refused_before_anything_else(copy, tmp_path):
    (copy.folder / "x.pkl").write_bytes(b"\x80\x04N.")
    (line,) = refused(copy, tmp_path / "v1", "claimed")
    assert "x.pkl: is a pickle" in line


def test_an_attack_is_scored_on_its_targets_and_verified(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(targets, "run", quick)
    one = scored(tmp_path, "attack", "peek")
    assert one.run == tmp_path / "runs" / "tiny-test" / "none-s0"
    record = read_record(one.run)
    assert (record.attack.name, record.defense.name) == ("peek", "none")
    entry = take(one, tmp_path / "v1", "rescored")
    assert entry.level is Level.RESCORED


def test_images_that_would_have_to_be_downloaded(copy, monkeypatch):
    path = copy.folder / "submission.yaml"
    path.write_text(path.read_text().replace(path.read_text().split("protocols: [")[1]
                    .split("]")[0], "cifar10-lite-v1"))  # fmt: skip
    with pytest.raises(SubmissionError, match="the sandbox has no network"):
        scoring.score(copy.folder, copy.run.parent / "runs", None)


def test_one_protocol_of_several(honest, copy):
    path = copy.folder / "submission.yaml"
    path.write_text(path.read_text().replace("protocols: [", "protocols: [cifar10-lite-v1, "))
    out, said = honest.run.parents[1], []
    scoring.score(copy.folder, out, None, attack="linear", protocol=TINY, say=said.append)
    assert said == [f"{honest.run}: there already"]
    with pytest.raises(SubmissionError, match="none of the protocols in"):
        scoring.score(copy.folder, out, None, protocol="cifar100-lite-v1")


def test_the_commands(copy, tmp_path, monkeypatch, unchecked):
    monkeypatch.setenv("MIBENCH_CACHE", str(copy.store.root))
    monkeypatch.delenv("MIBENCH_DATA", raising=False)
    words = ["submission", "verify", str(copy.folder), "--run", str(copy.run),
             "--root", str(tmp_path / "v1")]  # fmt: skip
    done = CliRunner().invoke(app, [*words, "--level", "claimed"])
    assert done.exit_code == 0, done.output
    assert done.stdout.rstrip().endswith(": claimed")
    shutil.rmtree(copy.run / "weights")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: rescored: ")
    assert len(done.stderr.strip().splitlines()) == 1
