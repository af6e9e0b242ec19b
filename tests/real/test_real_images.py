"""The whole way on real images: what must order itself does, by a margin, through the CLI."""

import os
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from mibench.cli import app
from mibench.record import Record, read_record

PROTOCOL = Path(__file__).with_name("cifar10-part.yaml")
PLACES = (os.environ.get("MIBENCH_DATA"), Path(__file__).parents[3] / "shared" / "data")

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """Runs the decoder against three defenses on one cache; returns the output folders."""
    roots = [Path(place) for place in PLACES if place and (Path(place) / "cifar10").is_dir()]
    if not roots:
        pytest.skip("no folder cifar10 in MIBENCH_DATA or ../shared/data")
    folder = tmp_path_factory.mktemp("real")
    runs = {"none": (), "noise": ("defense.snr_db=-6",), "privdfs": ()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIBENCH_CACHE", str(folder / "cache"))
        for defense, settings in runs.items():
            words = ["run", "--defense", defense, "--attack", "decoder", "--protocol", PROTOCOL]
            words += ["--data-root", roots[0], "--out", folder / defense]
            words += [word for setting in settings for word in ("--set", setting)]
            done = CliRunner().invoke(app, [str(word) for word in words])
            assert done.exit_code == 0, done.output
    return {defense: folder / defense for defense in runs}


def value(record: Record, part: str, metric: str) -> float:
    return next(s.value for s in getattr(record, part) if s.metric == metric)


def test_undefended_features_leak_the_image(attacked):
    record = read_record(attacked["none"])
    assert value(record, "scores", "psnr") > 18
    assert value(record, "scores", "psnr") > value(record, "prior_only", "psnr") + 4
    assert value(record, "scores", "psnr") > value(record, "permuted", "psnr") + 6
    assert value(record, "scores", "ssim") > value(record, "permuted", "ssim") + 0.3


def test_the_floor_is_that_of_cifar10(attacked):
    record = read_record(attacked["none"])
    assert value(record, "prior_only", "psnr") == pytest.approx(12.8, abs=0.7)
    assert value(record, "permuted", "psnr") < value(record, "prior_only", "psnr")


@pytest.mark.parametrize("defense", ["noise", "privdfs"])
def test_defenses_leak_less_on_their_worst_share(attacked, defense):
    none, record = read_record(attacked["none"]), read_record(attacked[defense])
    assert value(record, "scores", "psnr") < value(none, "scores", "psnr") - 1
    assert value(record, "scores", "ssim") < value(none, "scores", "ssim") - 0.05
    assert 0 < value(record, "leakage", "leakage(psnr)") < 0.9
    assert value(record, "undefended", "psnr") == value(none, "scores", "psnr")


def test_the_worst_of_all_shares_is_attacked(attacked):
    adversary = read_record(attacked["privdfs"]).adversary
    assert len(adversary.screening) == 4
    worst = min(adversary.screening, key=adversary.screening.__getitem__)
    assert adversary.corrupted == [int(worst)]


def test_per_image_values_give_the_means_of_the_record(attacked):
    record = read_record(attacked["privdfs"])
    table = pd.read_parquet(attacked["privdfs"] / "per_image.parquet")
    assert len(table) == 48
    for score in record.scores:
        assert table[score.metric].mean() == pytest.approx(score.value, rel=1e-6)
