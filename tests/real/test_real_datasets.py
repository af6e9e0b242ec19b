"""Every dataset with real images, on both families: what is rebuilt beats both controls."""

import os
from pathlib import Path

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from mibench.cli import app
from mibench.protocol import load_protocol
from mibench.record import read_record

PLACES = (os.environ.get("MIBENCH_DATA"), Path(__file__).parents[3] / "shared" / "data")
ROOTS = [Path(place) for place in PLACES if place]
# Short budgets: enough to tell features from a blind guess, not to judge anything.
RUNS = [
    ("cifar100-lite-vit-v1", "cifar100", {"steps": 30, "batch": 32}),
    ("celeba-lite-v1", "celeba", {"steps": 30, "batch": 32}),
    ("celeba-lite-vit-v1", "celeba", {"steps": 30, "batch": 32}),
    ("imagenet1k-lite-vit-v1", "imagenet-1k", {"steps": 10, "batch": 32}),
]

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


def short(protocol, recipe, folder):
    """The released protocol with short budgets."""
    values = load_protocol(protocol).model_dump(mode="json")
    values["id"], values["track"] = f"short-{protocol}", "test"
    values["recipe"] |= recipe
    values["data"]["attacked"] = 16
    for role in ("train", "auxiliary", "validation", "private"):
        values["data"][role]["identity"] = None
    values["attacks"] = {"decoder": {"steps": 100, "batch": 32}}
    values["metrics"] = {"psnr": 1, "ssim": 1}
    values["judge"] = None
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(("protocol", "folder", "recipe"), RUNS, ids=[run[0] for run in RUNS])
def test_undefended_images_are_rebuilt(protocol, folder, recipe, tmp_path, monkeypatch):
    root = next((root for root in ROOTS if (root / folder).is_dir()), None)
    if root is None:
        pytest.skip(f"no folder {folder} in MIBENCH_DATA or ../shared/data")
    monkeypatch.setenv("MIBENCH_CACHE", str(tmp_path / "cache"))
    words = ["run", "--defense", "none", "--attack", "decoder", "--part"]
    words += ["--protocol", short(protocol, recipe, tmp_path), "--data-root", root]
    done = CliRunner().invoke(app, [str(word) for word in [*words, "--out", tmp_path / "out"]])
    assert done.exit_code == 0, done.output
    record = read_record(tmp_path / "out")
    scores, floor, permuted = (
        {s.metric: s.value for s in part}
        for part in (record.scores, record.prior_only, record.permuted)
    )
    for control in (floor, permuted):
        assert scores["psnr"] > control["psnr"] + 2
        assert scores["ssim"] > control["ssim"] + 0.1
    assert (
        len((tmp_path / "out" / "manifest.txt").read_text().splitlines())
        == (record.data.images["private"])
    )
    assert len(pd.read_parquet(tmp_path / "out" / "per_image.parquet")) == 16
    if folder == "celeba":
        assert len(record.attributes) == 40
        assert {"accuracy", "balanced accuracy"} <= {score.metric for score in record.utility}
