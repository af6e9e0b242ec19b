import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from cli_words import PAIR, TINY
from PIL import Image

from mibench.cli.run import estimate_minutes
from mibench.protocol import load_protocol
from mibench.record import read_record

SAME = (
    "manifest", "scores", "undefended", "prior_only", "permuted", "leakage", "utility", "cost",
    "defense_facts", "attack_facts", "files", "defense", "attack", "backbone",
)  # fmt: skip


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_all_files_are_there_and_match_the_record(finished):
    record, out = finished.record, finished.out
    assert record.status == "success"
    names = {path.name for path in out.iterdir()}
    assert names == {
        "record.json",
        "per_image.parquet",
        "manifest.txt",
        "grid.png",
        "reconstructions",
        "permuted",
        "undefended",
        "guesses",
        "prior-sample",
    }
    pictures = sorted((out / "reconstructions").iterdir())
    assert [path.name for path in pictures] == [f"{index:04}.png" for index in range(8)]
    assert Image.open(pictures[0]).size == (32, 32)
    assert sha256(out / "manifest.txt") == record.manifest
    assert len((out / "manifest.txt").read_text().splitlines()) == 64

    def together(name):
        files = sorted((out / name).iterdir())
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()

    folders = ("reconstructions", "permuted", "undefended", "guesses", "prior-sample")
    assert record.files == {
        **{name: together(name) for name in folders},
        "grid.png": sha256(out / "grid.png"),
        "manifest.txt": record.manifest,
        "per_image.parquet": sha256(out / "per_image.parquet"),
    }


@pytest.mark.slow
def test_per_image_values_have_the_means_of_the_record(finished):
    table = pd.read_parquet(finished.out / "per_image.parquet")
    assert list(table.columns[:4]) == ["index", "sha256", "label", "class"]
    assert len(table) == 8
    for score in finished.record.scores:
        if score.value is None:
            assert score.metric not in table
        else:
            assert np.isclose(table[score.metric].mean(), score.value)
    assert table["correct"].dtype == bool


@pytest.mark.slow
def test_the_plan_comes_before_and_the_table_after(finished):
    text = finished.stdout
    assert not text.startswith("No --protocol")
    for words in (
        "privdfs", "tiny-test (", "procedural, 32x32", "the first 8 of 64 private images",
        "white_box", "under a minute on two CPU cores; parts already in the cache make it shorter",
    ):  # fmt: skip
        assert words in text.partition("higher = more")[0]
    for words in (
        "PSNR (dB)", "undefended, same attack", "blind guess (", "attack on permuted shares",
        "normalised leakage", "Accuracy:", "points", "FLOPs", "bytes up", "reads server",
        "Not ranked", str(finished.out),
    ):  # fmt: skip
        assert words in text


@pytest.mark.slow
def test_a_second_run_reuses_everything_and_gives_the_same(invoke, finished, monkeypatch):
    monkeypatch.setenv("MIBENCH_CACHE", str(finished.cache))
    again = invoke(*PAIR, "--out", "again")
    assert again.exit_code == 0, again.output
    for words in ("trained defense privdfs", "trained defense none", "decoder", "reconstruction"):
        assert f"reused {words}" in again.stdout or f"reused the {words}" in again.stdout
    record = read_record(Path("again"))
    # A latency is measured anew in every run.
    timeless = {"latency_ratio": None}
    for field in SAME:
        one, other = getattr(record, field), getattr(finished.record, field)
        if field == "cost":
            one, other = (cost.model_copy(update=timeless) for cost in (one, other))
        assert one == other, field


@pytest.mark.slow
def test_a_finished_result_outlasts_a_failure(refused, finished, monkeypatch):
    before = (finished.out / "record.json").read_bytes()
    data_error = "mibench.evaluate.load_roles"
    monkeypatch.setattr(data_error, _raise_data_error)
    assert "no such images" in refused(*PAIR, "--out", finished.out)
    assert (finished.out / "record.json").read_bytes() == before


def _raise_data_error(*_):
    from mibench.errors import DataError

    raise DataError("no such images")


def test_a_dry_run_writes_nothing(invoke, tmp_path):
    result = invoke(*PAIR, "--dry-run", "--set", "defense.density=0.125")
    assert result.exit_code == 0, result.output
    assert "privdfs with density=0.125" in result.stdout
    out = next(line for line in result.stdout.splitlines() if line.startswith("out "))
    leaf = out.split()[-1]
    assert leaf.startswith("runs/tiny-test/privdfs-diffusion-")
    assert len(leaf.split("-")[-2]) == 8
    assert list(tmp_path.iterdir()) == []


def test_without_a_protocol_the_first_line_says_what_that_means(invoke):
    result = invoke("run", "--defense", "none", "--attack", "decoder", "--dry-run")
    first = result.stdout.splitlines()[0]
    for words in ("procedural-smoke-v1", "never ranked", "--protocol cifar10-lite-v1"):
        assert words in first


def test_what_departs_from_the_protocol_is_said_before_the_run(invoke):
    result = invoke(*PAIR, "--dry-run", "--seed", "7", "--set", "attack.sampler.steps=3")
    assert "departs from its protocol" in result.stdout
    assert "seed 7" in result.stdout
    assert "sampler.steps=3" in result.stdout.replace('{"steps": 3}', ".steps=3").replace("=.", ".")


def test_minutes_count_twice_for_a_defended_run():
    protocol = load_protocol(TINY)
    assert estimate_minutes(protocol, "none", "diffusion") == pytest.approx(0.3)
    assert estimate_minutes(protocol, "privdfs", "diffusion") == pytest.approx(0.6)
    assert estimate_minutes(protocol, "privdfs", "decoder") is None
