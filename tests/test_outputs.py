import dataclasses
import hashlib
import os
import time

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image, ImageDraw

from mibench import gallery, outputs
from mibench.data.sets import ImageSet
from mibench.errors import StorageError
from mibench.evaluate import Result, manifest_text
from mibench.record import Component, ProtocolId, Record, Score, read_record
from mibench.task import Attributes, Classification


def component(name):
    return Component(name=name, version=1, code="0" * 16, params={})


def a_score(metric, higher=True):
    return Score(
        metric=metric, version=1, unit="", higher_is_better=higher, value=0.5, ci_low=0.4,
        ci_high=0.6, n=4,
    )  # fmt: skip


def make_result(count=20, size=32):
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=draw, dtype=torch.uint8)
    record = Record(
        status="started",
        protocol=ProtocolId(id="p", content="c", track="test", ranked=False),
        defense=component("none"),
        attack=component("decoder"),
        backbone=component("small-resnet"),
        seed=0,
        deviations=[],
        started="2024-01-01T00:00:00+00:00",
        scores=[a_score("mse", higher=False), a_score("ssim")],
        provenance={},
    )
    images = torch.rand(count, 3, size, size, generator=draw)
    originals = ImageSet(pixels, torch.arange(count) % 2)
    manifest = originals.hashes()
    digest = hashlib.sha256(manifest_text(manifest)).hexdigest()
    return Result(
        record=record.model_copy(update={"manifest": digest}),
        manifest=manifest,
        task=Classification(("cat", "dog")),
        originals=originals,
        reconstructions=images,
        controls={"permuted": images.roll(-1, 0)},
        per_image={
            "mse": torch.linspace(0, 1, count, dtype=torch.float64),
            "ssim": torch.linspace(0, 1, count, dtype=torch.float64),
            "correct": torch.ones(count),
        },
    )


def test_the_record_comes_last_and_names_every_file(tmp_path, monkeypatch):
    written = []
    real = outputs.write_atomically
    monkeypatch.setattr(
        outputs,
        "write_atomically",
        lambda path, data: (written.append(path.name), real(path, data)),
    )
    record = outputs.write_result(make_result(), tmp_path)
    assert written[-1] == "record.json"
    assert read_record(tmp_path) == record
    assert set(record.files) == {"per_image.parquet", "manifest.txt", "grid.png", "reconstructions"}
    for name in ("per_image.parquet", "manifest.txt", "grid.png"):
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == record.files[name]


def test_writing_twice_gives_the_same_bytes(tmp_path):
    one = outputs.write_result(make_result(), tmp_path / "a")
    two = outputs.write_result(make_result(), tmp_path / "b")
    assert one == two


def test_reconstructions_are_rounded_and_lossless(tmp_path):
    result = make_result(3)
    outputs.write_result(result, tmp_path)
    stored = np.asarray(Image.open(tmp_path / "reconstructions" / "0002.png"))
    exact = result.reconstructions[2].permute(1, 2, 0).numpy() * 255
    assert np.abs(stored - exact).max() <= 0.5 + 1e-4


def test_the_table_has_one_row_per_image(tmp_path):
    result = make_result(4)
    outputs.write_result(result, tmp_path)
    table = pd.read_parquet(tmp_path / "per_image.parquet")
    assert list(table["class"]) == ["cat", "dog", "cat", "dog"]
    assert list(table["sha256"]) == result.originals.hashes()
    assert list(table["index"]) == [0, 1, 2, 3]
    assert table["correct"].all()


def test_many_columns_take_little_more_room_than_their_values(tmp_path):
    result, columns = make_result(128, size=4), 80
    draws = torch.rand(columns, 128, dtype=torch.float64)
    values = {f"attack-{at}_psnr": draws[at] for at in range(columns)}
    outputs.write_result(dataclasses.replace(result, per_image=values), tmp_path)
    path = tmp_path / "per_image.parquet"
    hashes = 128 * 64
    assert path.stat().st_size < 1.2 * (8 * draws.numel() + hashes)
    table = pd.read_parquet(path)
    assert list(table.columns[-columns:]) == list(values)
    assert (torch.tensor(table["attack-7_psnr"].to_numpy()) == draws[7]).all()


def test_attributes_are_listed_by_name(tmp_path):
    result = make_result(3)
    labels = torch.tensor([[1, 0], [1, 1], [0, 0]], dtype=torch.uint8)
    result = dataclasses.replace(
        result,
        task=Attributes(("Smiling", "Young")),
        originals=ImageSet(result.originals.pixels, labels),
        per_image={**result.per_image, "correct": torch.tensor([0.5, 1.0, 0.0])},
    )
    outputs.write_result(result, tmp_path)
    table = pd.read_parquet(tmp_path / "per_image.parquet")
    assert list(table["class"]) == ["Smiling", "Smiling, Young", ""]
    assert list(table["correct"]) == [0.5, 1.0, 0.0]
    assert "label" not in table


def test_the_manifest_names_every_private_image_in_order(tmp_path):
    result = make_result(5)
    outputs.write_result(result, tmp_path)
    lines = (tmp_path / "manifest.txt").read_text().splitlines()
    assert lines == result.originals.hashes()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write in"):
        outputs.write_result(make_result(2), tmp_path / "file")


def test_only_old_leftovers_of_ours_are_removed(tmp_path):
    old, new, other = (tmp_path / name for name in (".mibench-1.tmp", ".mibench-2.tmp", "mine.tmp"))
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (time.time() - 3600,) * 2)
    outputs.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {".mibench-2.tmp", "mine.tmp"}


@pytest.mark.parametrize(
    ("scores", "first", "by"),
    [
        ([a_score("mse", higher=False), a_score("ssim")], 2, "SSIM"),
        ([a_score("mse", higher=False)], 0, "MSE"),
        ([], 0, "index"),
    ],
)
def test_the_worst_leak_comes_first(scores, first, by):
    values = {"mse": [0.1, 0.2, 0.3], "ssim": [0.1, 0.2, 0.3]}
    order, sorted_by = gallery.ranking(values, scores, 3)
    assert (order[0], sorted_by) == (first, by)


@pytest.mark.parametrize(("count", "size"), [(1, 32), (20, 32), (9, 64), (3, 128)])
def test_a_grid_of_any_size_can_be_drawn(tmp_path, count, size):
    outputs.write_result(make_result(count, size), tmp_path)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 3 * size
        assert grid.height > min(count, gallery.PER_PANEL) * size


def test_a_long_caption_does_not_run_into_the_next():
    pen = ImageDraw.Draw(Image.new("RGB", (9, 9)))
    width = 112
    for caption in ("cat", "sloth bear, Melursus ursinus, Ursus ursinus", "W" * 80):
        shown = gallery._shortened(caption, pen, width)
        assert pen.textlength(shown, font=gallery._font(11)) <= width
        assert caption.startswith(shown.removesuffix("..."))
        assert (shown == caption) is (caption == "cat")
