"""Galleries: which images are shown, in which columns, and where none may be."""

import io
import shutil

import numpy as np
import pandas as pd
import pytest
from board_runs import run_folder
from forged_runs import forge
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mibench.board import gallery
from mibench.data.base import Dataset
from mibench.outputs import PER_IMAGE
from mibench.record import SuitePart, read_record
from mibench.registry import datasets

ALLOWED = {"cifar10", "cifar100", "procedural"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = run_folder(tmp_path_factory.mktemp("gallery") / "run")
    record = read_record(folder)
    count, side = record.data.images["attacked"], record.data.image_size
    draws = np.random.default_rng(0)
    return folder, record, draws.integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def opened(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def of_dataset(record, name, private=None):
    values = dict(record.protocol.values)
    values["data"] = values["data"] | {"private": values["data"]["private"] | {"dataset": private}}
    return record.model_copy(
        update={
            "data": record.data.model_copy(update={"dataset": name}),
            "protocol": record.protocol.model_copy(update={"values": values}),
        }
    )


def test_one_column_each_and_the_same_bytes_twice(run):
    data, told = gallery.draw(*run)
    side = run[1].data.image_size
    assert told.columns == ["original", "decoder", "permuted"]
    assert len(told.images) == gallery.MOST
    assert opened(data).shape == (gallery.MOST * side, 3 * side, 3)
    assert len(data) <= gallery.LIMIT
    assert gallery.draw(*run) == (data, told)


def test_rows_go_from_the_most_leaked_to_the_least(run):
    folder, record, originals = run
    told = gallery.draw(folder, record, originals)[1]
    ssim = pd.read_parquet(folder / PER_IMAGE)["ssim"]
    shown = [ssim[image] for image in told.images]
    assert shown == sorted(shown, reverse=True)
    assert set(range(gallery.COMMON)) <= set(told.images)
    others = [image for image in told.images if image >= gallery.COMMON]
    assert ssim[others[0]] == ssim[gallery.COMMON :].max()
    assert ssim[others[-1]] == ssim[gallery.COMMON :].min()


def test_cells_hold_the_images_of_the_run(run, monkeypatch):
    monkeypatch.setattr(gallery, "LIMIT", 10**9)  # stored without loss
    folder, record, originals = run
    data, told = gallery.draw(folder, record, originals)
    sheet, side = opened(data), told.side
    for line, image in enumerate(told.images):
        cells = [sheet[line * side :][:side, x * side :][:, :side] for x in range(3)]
        assert np.array_equal(cells[0], originals[image])
        for cell, kind in zip(cells[1:], ("reconstructions", "permuted"), strict=True):
            assert np.array_equal(cell, np.asarray(Image.open(folder / kind / f"{image:04}.png")))


def test_floats_and_channels_first_are_the_same_images(run):
    folder, record, originals = run
    floats = (originals / np.float32(255)).transpose(0, 3, 1, 2)
    assert gallery.draw(folder, record, floats) == gallery.draw(folder, record, originals)


@given(count=st.integers(1, 200), data=st.data())
def test_never_more_than_sixteen_and_none_twice(count, data):
    order = data.draw(st.permutations(range(count)))
    shown = gallery.chosen(order)
    assert len(shown) == len(set(shown)) == min(count, gallery.MOST)
    assert shown == [image for image in order if image in shown]
    assert set(range(min(count, gallery.COMMON))) <= set(shown)


@pytest.fixture
def suite(run, tmp_path):
    """A suite of two attacks; each control is the worse one for half of the images."""
    folder, record, originals = run
    whole = tmp_path / "suite"
    shutil.copytree(folder, whole)
    shutil.rmtree(whole / "permuted")
    table = pd.read_parquet(whole / PER_IMAGE)
    for at, name in enumerate(("linear", "decoder")):
        shutil.copytree(folder, whole / name)
        own = table.assign(permuted_ssim=[float(image % 2 == at) for image in range(len(table))])
        own.to_parquet(whole / name / PER_IMAGE, index=False)
        for image in range(len(table)):
            for kind, shade in (("reconstructions", 100), ("permuted", 200)):
                flat = np.full(originals.shape[1:], shade + at, np.uint8)
                Image.fromarray(flat).save(whole / name / kind / f"{image:04}.png")
    parts = [
        SuitePart(attack="linear", scores=record.scores, share_of_worst={"ssim": 0.2}),
        SuitePart(attack="decoder", scores=record.scores, share_of_worst={"ssim": 0.8}),
        SuitePart(attack="gradient", reason="does not apply"),
    ]
    return whole, record.model_copy(update={"suite": parts}), originals


def test_a_suite_has_the_worst_and_a_column_for_each_attack_that_applied(suite, monkeypatch):
    monkeypatch.setattr(gallery, "LIMIT", 10**9)
    data, told = gallery.draw(*suite)
    assert told.columns == ["original", "worst", "linear", "decoder", "permuted"]
    sheet, side = opened(data), told.side
    for line, image in enumerate(told.images):
        middle = sheet[line * side + side // 2, side // 2 :: side, 0]
        assert middle[2:].tolist() == [100, 101, 200 + image % 2]


def test_only_the_worst_attacks_have_a_column_where_there_are_many(suite, monkeypatch):
    monkeypatch.setattr(gallery, "MOST_ATTACKS", 1)
    assert gallery.draw(*suite)[1].columns == ["original", "worst", "decoder", "permuted"]


def test_a_part_that_leads_out_of_the_folder_is_not_read(suite):
    folder, record, originals = suite
    outside = [one.model_copy(update={"attack": f"../suite/{one.attack}"}) for one in record.suite]
    told = gallery.draw(folder, record.model_copy(update={"suite": outside}), originals)
    assert isinstance(told, str)


def test_a_large_picture_is_made_smaller(run, monkeypatch):
    small = gallery.draw(*run)[0]
    monkeypatch.setattr(gallery, "LIMIT", len(small) // 2)
    assert len(gallery.draw(*run)[0]) < len(small)


# --- where none may be shown ---------------------------------------------------------------------


def test_only_datasets_whose_terms_allow_it_are_shown():
    assert Dataset.shown is False
    assert {name for name in datasets.names() if datasets.load(name).shown} == ALLOWED


@pytest.mark.parametrize("name", ["celeba", "imagenet1k", "./my-faces/", "nobody-knows"])
def test_other_datasets_are_refused_with_a_reason(run, name):
    folder, record, originals = run
    for own in (of_dataset(record, name), of_dataset(record, "cifar10", private=name)):
        told = gallery.draw(folder, own, originals)
        assert told == f"the terms of {name} are not known to let its images stand on a public page"


def test_generated_images_are_shown(tmp_path):
    record = forge(tmp_path / "run", protocol_id="procedural-smoke-v1")
    count, side = record.data.images["attacked"], record.data.image_size
    originals = np.zeros((count, side, side, 3), np.uint8)
    data, told = gallery.draw(tmp_path / "run", record, originals)
    assert len(told.images) == min(count, gallery.MOST)
    assert data[:4] == b"RIFF"


def test_without_originals_there_is_a_reason(run):
    assert "not at hand" in gallery.draw(run[0], run[1], None)


def test_missing_and_broken_images_are_a_reason(run, tmp_path):
    folder, record, originals = run
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "permuted")
    assert "cannot be read" in gallery.draw(tmp_path / "run", record, originals)
    assert "were scored" in gallery.draw(folder, record, originals[:5])


def test_images_of_another_size_are_a_reason(run):
    folder, record, originals = run
    assert "differ in size" in gallery.draw(folder, record, originals[:, :16, :16])
