"""From claimed to rescored: a real small run, and what stands in the way."""

import json

import pytest

from mibench.artifacts import ArtifactStore
from mibench.board import entries, layout
from mibench.board.model import Level
from mibench.evaluate import evaluate
from mibench.job import Job
from mibench.outputs import RECORD, write_result
from mibench.protocol import load_protocol

TINY = """
id: tiny-board
track: test
title: a test
data:
  dataset: procedural
  image_size: 32
  train: {split: stream, start: 0, count: 128}
  auxiliary: {split: stream, start: 1000000, count: 128}
  validation: {split: stream, start: 3000000, count: 32}
  private: {split: stream, start: 2000000, count: 64}
  attacked: 8
backbone: {name: small-resnet, params: {stem: 8, width: 8}, split_point: stem}
recipe: {steps: 5, batch: 16}
attacks: {linear: {}, decoder: {steps: 5, batch: 16}}
metrics: {mse: 1, psnr: 1, ssim: 1}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run of both attacks, and the cache that it filled."""
    folder = tmp_path_factory.mktemp("board")
    (folder / "tiny.yaml").write_text(TINY)
    protocol, store = load_protocol(str(folder / "tiny.yaml")), ArtifactStore(folder / "cache")
    result = evaluate(Job(protocol, "noise", "suite", {}, {}), store, None, "cpu")
    write_result(result, folder / "run")
    return folder / "run", store


def test_scores_and_accuracy_are_computed_again(made, tmp_path):
    run, store = made
    entry = entries.add(run, tmp_path / "v1", store=store)
    assert entry.level is Level.RESCORED
    lines = {line.check: line for line in entry.verifications[-1].checks}
    assert lines["rescored-scores"].verdict == "passed"
    # Score and three controls of the suite, and both attacks alone, of three metrics.
    assert lines["rescored-scores"].found.startswith("18 columns")
    assert lines["rescored-accuracy"].verdict == "passed"
    assert "on 64 images" in lines["rescored-accuracy"].found
    assert entry.verifications[0].level is Level.CLAIMED


def test_without_the_weights_it_stays_claimed_and_says_so(made, tmp_path):
    run, _ = made
    empty = ArtifactStore(tmp_path / "empty")
    entry = entries.add(run, tmp_path / "v1", store=empty)
    assert entry.level is Level.CLAIMED
    (said,) = entry.verifications[-1].differences
    assert "accuracy was not computed again: the trained defense" in said
    assert not (empty.root / "defense").exists()  # nothing is trained for it


def test_an_entry_rises_when_the_weights_are_found(made, tmp_path):
    run, store = made
    entries.add(run, tmp_path / "v1", store=ArtifactStore(tmp_path / "empty"))
    entry = entries.add(run, tmp_path / "v1", store=store)
    assert [one.level for one in entry.verifications] == [
        Level.CLAIMED, Level.CLAIMED, Level.RESCORED,
    ]  # fmt: skip
    assert len(entries.read(tmp_path / "v1").held) == 1


def test_an_accuracy_that_the_weights_do_not_give_is_told(made, tmp_path):
    from mibench.board.rescoring import rescored
    from mibench.record import read_record

    run, store = made
    record = read_record(run)
    better = [
        one.model_copy(update={"value": (one.value or 0) + 0.25}) if one.metric == "accuracy"
        else one
        for one in record.utility
    ]  # fmt: skip
    found = rescored(run, record.model_copy(update={"utility": better}), store, None)
    assert found.level is Level.CLAIMED
    assert [line.verdict for line in found.checks] == ["passed", "failed"]


def test_a_picture_that_scores_otherwise_is_told(made, tmp_path, monkeypatch):
    """All hashes follow, so that only the scores can tell."""
    from mibench.board import rescoring
    from mibench.record import read_record

    run, store = made
    whole = rescoring.rescore

    def disturbed(*args):
        found = whole(*args)
        found.result.per_image["ssim"][0] += 0.01
        return found

    monkeypatch.setattr(rescoring, "rescore", disturbed)
    found = rescoring.rescored(run, read_record(run), store, None)
    assert found.level is Level.CLAIMED
    assert found.checks[0].verdict == "failed"
    assert "ssim of an image changed by 0.01" in found.checks[0].found


def test_it_lies_on_the_board_as_it_was_made(made, tmp_path):
    run, store = made
    entry = entries.add(run, tmp_path / "v1", store=store)
    text = (layout.record_folder(tmp_path / "v1", entry.record) / RECORD).read_text()
    assert json.loads(text) == json.loads((run / RECORD).read_text())
