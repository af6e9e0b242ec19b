"""A user's own images, and a part of a dataset: run without code, marked, refused in one line."""

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from cli_words import TINY
from PIL import Image

from mibench.record import read_record

FAST = ["--defense", "noise", "--attack", "decoder", "--protocol", TINY]


@pytest.fixture(autouse=True)
def _own_cache_of_the_library(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))


def picture(index, size=40):
    """Class 0 is dark, class 1 is bright."""
    draws = np.random.default_rng(index)
    level = 60 if index % 2 == 0 else 190
    pixels = draws.normal(level, 30, (size, size + 8, 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    for index in range(200):
        path = folder / ("night", "day")[index % 2] / f"{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
    return folder


def small(folder, **data):
    """The tiny protocol with other data."""
    values = yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))
    values["data"] |= data
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_a_folder_of_pictures_is_a_dataset(invoke, pictures, tmp_path):
    done = invoke("run", *FAST, "--dataset", f"{pictures}/", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    record = read_record(tmp_path / "out")
    assert record.data.dataset == str(pictures)
    assert record.data.left_out == {}
    images = record.data.images
    assert sum(images[role] for role in ("train", "auxiliary", "validation", "private")) == 200
    assert not record.protocol.ranked
    table = pd.read_parquet(tmp_path / "out" / "per_image.parquet")
    assert set(table["class"]) <= {"night", "day"}
    accuracy = next(s for s in record.utility if s.metric == "accuracy")
    assert accuracy.value > 0.6


@pytest.mark.slow
def test_a_parquet_file_with_other_names_is_a_dataset(invoke, tmp_path):
    rows = []
    for index in range(120):
        buffer = io.BytesIO()
        picture(index).save(buffer, "JPEG")
        kind = ("night", "day")[index % 2]
        rows.append({"photo": {"bytes": buffer.getvalue(), "path": None}, "when": kind})
    folder = tmp_path / "mine"
    folder.mkdir()
    pd.DataFrame(rows).to_parquet(folder / "all.parquet")
    done = invoke("run", *FAST, "--dataset", folder, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    table = pd.read_parquet(tmp_path / "out" / "per_image.parquet")
    assert set(table["class"]) == {"night", "day"}


def photos(tmp_path, train, test):
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    for split, count, first in (("train", train, 0), ("test", test, 1000)):
        rows = []
        for index in range(first, first + count):
            buffer = io.BytesIO()
            picture(index, 32).crop((0, 0, 32, 32)).save(buffer, "PNG")
            rows.append({"img": {"bytes": buffer.getvalue(), "path": None}, "label": index % 2})
        pd.DataFrame(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder.parent


@pytest.fixture
def whole(tmp_path):
    return small(
        tmp_path,
        dataset="cifar10",
        train={"split": "train", "start": 0, "count": 300},
        auxiliary={"split": "train", "start": 300, "count": 200},
        validation={"split": "train", "start": 500, "count": 100},
        private={"split": "test", "start": 0, "count": 80},
    )


@pytest.mark.slow
def test_a_part_of_a_dataset_needs_the_flag_and_shrinks_every_role(
    invoke, refused, tmp_path, whole
):
    words = ["run", "--defense", "none", "--attack", "decoder", "--protocol", whole]
    words += ["--data-root", photos(tmp_path, train=120, test=20), "--out", tmp_path / "out"]
    line = refused(*words)
    assert "holds 20 images" in line
    assert "--part" in line
    done = invoke(*words, "--part")
    assert done.exit_code == 0, done.output
    images = read_record(tmp_path / "out").data.images
    assert images == {
        "train": 60, "auxiliary": 40, "validation": 20, "private": 20, "attacked": 8,
    }  # fmt: skip


def test_on_a_released_protocol_both_are_deviations(invoke, pictures):
    plan = invoke(
        "run", "--defense", "none", "--attack", "decoder", "--protocol", "cifar10-lite-v1",
        "--dataset", f"{pictures}/", "--dry-run",
    )  # fmt: skip
    assert plan.exit_code == 0, plan.output
    assert "data differs from the released cifar10-lite-v1" in plan.output


@pytest.mark.parametrize(
    ("dataset", "words"),
    [("./nowhere/", "no folder"), ("cifra10", "did you mean 'cifar10'")],
)
def test_a_dataset_that_is_not_there(refused, dataset, words):
    assert words in refused("run", *FAST, "--dataset", dataset)


def test_a_split_point_that_the_backbone_lacks(refused, tmp_path):
    values = yaml.safe_load(Path(TINY).read_text(encoding="utf-8"))
    values["backbone"]["split_point"] = "layer9"
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values))
    line = refused("run", "--defense", "none", "--attack", "decoder", "--protocol", path)
    for words in ("layer9", "layer1", "stem", "small-resnet"):
        assert words in line
