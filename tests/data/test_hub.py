"""Datasets in the hub's layout, from a folder: in order, whole, and refused in one line if not."""

import io
import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mibench.data.celeba import CelebA
from mibench.data.cifar10 import Cifar10
from mibench.data.cifar100 import Cifar100
from mibench.data.imagenet1k import ImageNet1k
from mibench.errors import DataError, UnavailableError

REAL = (os.environ.get("MIBENCH_DATA"), Path(__file__).parents[3] / "shared" / "data")


def pixels(index, size=32):
    return np.random.default_rng(index).integers(0, 256, (size, size, 3), dtype=np.uint8)


def write(path, indices, size=32, image="img", label="label", mode="RGB"):
    features = datasets.Features(
        {image: datasets.Image(), label: datasets.ClassLabel(names=list(Cifar10.task.names))}
    )
    pictures = [Image.fromarray(pixels(i, size)).convert(mode) for i in indices]
    rows = {image: pictures, label: [i % 10 for i in indices]}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data root"


def load(root, split="train", start=0, count=4):
    return Cifar10(root, 32, root.parent / "cache").load(split, start, count)


def assert_holds(images, indices):
    assert images.raw().shape == (len(indices), 3, 32, 32)
    for got, index in zip(images.raw(), indices, strict=True):
        assert np.array_equal(got.permute(1, 2, 0).numpy(), pixels(index))
    assert images.labels.tolist() == [i % 10 for i in indices]


@pytest.mark.parametrize("inner", [".", "data"])
def test_images_and_labels_come_in_order(root, inner):
    write(root / "cifar10" / inner / "train-00000-of-00001.parquet", range(12))
    write(root / "cifar10" / inner / "test-00000-of-00001.parquet", range(50, 56))
    assert_holds(load(root, count=12), range(12))
    assert_holds(load(root, start=3, count=5), range(3, 8))
    assert_holds(load(root, "test", start=1), range(51, 55))


def test_several_files_are_one_split(root):
    for number, indices in enumerate((range(5), range(5, 9), range(9, 12))):
        write(root / "cifar10" / f"train-0000{number}-of-00003.parquet", indices)
    assert_holds(load(root, start=3, count=8), range(3, 11))


def test_a_replaced_file_is_read_anew(root):
    path = root / "cifar10" / "train-00000-of-00001.parquet"
    write(path, range(4))
    load(root)
    write(path, range(20, 24))
    os.utime(path, (1, 1))
    assert_holds(load(root), range(20, 24))


def test_a_replaced_file_of_the_same_size_and_time_is_read_anew(root):
    path = root / "cifar10" / "train-00000-of-00001.parquet"
    for cells in ([0, 1], [2, 3]):
        raw(path, [{"bytes": bmp(number), "path": None} for number in cells])
        os.utime(path, (1, 1))
        images = load(root, count=2)
        assert [image.permute(1, 2, 0).tolist() for image in images.raw()] == [
            pixels(number).tolist() for number in cells
        ]


def bmp(number):
    """A file whose length does not depend on what it shows."""
    data = io.BytesIO()
    Image.fromarray(pixels(number)).save(data, "BMP")
    return data.getvalue()


def test_touched_files_are_not_decoded_again(root):
    path = root / "cifar10" / "train-00000-of-00001.parquet"
    write(path, range(4))
    load(root)
    os.utime(path, (1, 1))
    assert_holds(load(root), range(4))
    assert len(list((root.parent / "cache" / "images").iterdir())) == 1


def test_a_copy_of_the_library_that_lacks_rows_is_refused(root):
    path = root / "cifar10" / "train-00000-of-00001.parquet"
    write(path, range(6))
    load(root)
    [copy] = datasets.config.HF_DATASETS_CACHE.rglob("*.arrow")
    whole = datasets.Dataset.from_file(str(copy)).data.table.slice(0, 4)
    # As a map of the old one is open, a new file takes its place.
    with pa.OSFile(f"{copy}.new", "wb") as file, pa.ipc.new_stream(file, whole.schema) as writer:
        writer.write_table(whole)
    copy.with_name(f"{copy.name}.new").replace(copy)
    refused(root, "holds 6 images", "holds 4", str(copy.parent), "delete that folder")


def test_grey_images_become_three_equal_channels(root):
    write(root / "cifar10" / "train-00000-of-00001.parquet", range(4), mode="L")
    found = load(root).raw()
    assert found.shape == (4, 3, 32, 32)
    assert (found[:, 0] == found[:, 2]).all()


def refused(root, *words, split="train", **where):
    with pytest.raises(DataError) as caught:
        load(root, split, **where)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder(root):
    refused(root, str(root / "cifar10"), "--data-root")


def test_a_missing_split(root):
    write(root / "cifar10" / "train-00000-of-00001.parquet", range(4))
    refused(root, "'test' is missing", split="test")


@pytest.mark.parametrize("renamed", [{"image": "image"}, {"label": "labels"}])
def test_a_missing_column(root, renamed):
    write(root / "cifar10" / "train-00000-of-00001.parquet", range(4), **renamed)
    refused(root, "has no column", *renamed.values(), "uoft-cs/cifar10")


@pytest.mark.parametrize("keep", [0, 100, 0.5])
def test_a_truncated_file(root, keep):
    path = root / "cifar10" / "train-00000-of-00001.parquet"
    write(path, range(4))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep < 1 else keep])
    refused(root, path.name)


def test_images_of_another_size(root):
    write(root / "cifar10" / "train-00000-of-00001.parquet", range(4), size=24)
    refused(root, "24x24", "32x32", "image 0")


@pytest.mark.parametrize(("start", "count"), [(0, 5), (4, 1), (2, 3)])
def test_a_split_that_is_too_short(root, start, count):
    write(root / "cifar10" / "train-00000-of-00001.parquet", range(4))
    refused(
        root, "holds 4 images", f"{start} to {start + count}", "--part", start=start, count=count
    )


def raw(path, cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"img": pa.array(cells, kind), "label": list(range(len(cells)))}), path)


def test_a_broken_image_inside_a_whole_file(root):
    path = root / "cifar10" / "train-00000-of-00001.parquet"
    write(path, range(4))
    table = pq.read_table(path)
    cells = table.column("img").to_pylist()
    cells[2]["bytes"] = b"not a picture"
    column = pa.array(cells, table.schema.field("img").type)
    pq.write_table(table.set_column(0, table.schema.field("img"), column), path)
    assert_holds(load(root, count=2), range(2))
    refused(root, "image 2 is unreadable", "copy the files again", str(root / "cifar10"))


def test_a_file_without_the_hubs_own_notes_is_refused_or_read(root):
    path = root / "cifar10" / "train-00000-of-00001.parquet"
    write(path, range(4))
    raw(path, pq.read_table(path).column("img").to_pylist())
    try:
        images = load(root)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017 - either outcome is fine, a traceback is not
    else:
        assert_holds(images, range(4))


def test_labels_outside_the_classes(root):
    path = root / "cifar10" / "train-00000-of-00001.parquet"
    write(path, range(4))
    table = pq.read_table(path)
    labels = pa.array([0, 1, 10, -1])
    pq.write_table(table.set_column(1, "label", labels).replace_schema_metadata(), path)
    assert_holds(load(root, count=2), range(2))
    refused(root, "image 2 has the label 10", "classes 0 to 9")


def test_a_column_that_holds_no_images(root):
    path = root / "cifar10" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table({"img": [1, 2], "label": [0, 1]}), path)
    refused(root, "'img' holds no images", count=2)


def test_another_size_than_the_native_one(root):
    write(root / "cifar10" / "train-00000-of-00001.parquet", range(4))
    with pytest.raises(DataError, match="32x32 pixels, but the protocol says 64x64"):
        Cifar10(root, 64, root.parent / "cache").load("train", 0, 4)


def test_a_split_without_images(root):
    write(root / "cifar10" / "train-00000-of-00001.parquet", [])
    refused(root, "cannot be read", "no data")


def test_the_place_of_the_files_does_not_count(root, tmp_path):
    write(root / "cifar10" / "train-00000-of-00001.parquet", range(4))
    before = load(root)
    root.rename(tmp_path / "elsewhere [1]")
    after = load(tmp_path / "elsewhere [1]")
    assert after.identity == before.identity
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 1  # and decoded only once


# The hub itself -----------------------------------------------------------------------------------


def unavailable(monkeypatch, tmp_path, dataset, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UnavailableError) as caught:
        dataset(None, 32, tmp_path).load("train", 0, 1)
    assert "\n" not in str(caught.value)
    assert "--data-root" in str(caught.value)
    return str(caught.value)


def test_a_gated_dataset_says_what_to_do(monkeypatch, tmp_path):
    error = datasets.exceptions.DatasetNotFoundError("'x' is a gated dataset on the Hub.")
    text = unavailable(monkeypatch, tmp_path, ImageNet1k, error)
    assert "accept its terms" in text
    assert "`hf auth login`" in text
    assert "imagenet-1k/<split>-*.parquet" in text


@pytest.mark.parametrize(
    "error", [ConnectionError("no route"), datasets.exceptions.DatasetNotFoundError("gone")]
)
def test_a_hub_that_cannot_be_reached(monkeypatch, tmp_path, error):
    assert "cannot get" in unavailable(monkeypatch, tmp_path, Cifar10, error)


def test_the_librarys_own_table_is_read_as_well(monkeypatch, root, tmp_path):
    path = root / "train.parquet"
    write(path, range(6))
    table = datasets.load_dataset("parquet", data_files=str(path), split="train")
    assert table.cache_files
    monkeypatch.setattr(datasets, "load_dataset", lambda hub_id, split: table)
    assert_holds(Cifar10(None, 32, tmp_path / "cache").load("train", 1, 4), range(1, 5))


# The other datasets -------------------------------------------------------------------------------


def write_faces(path, holds):
    count = len(holds)
    features = {"image": datasets.Image(), "celeb_id": datasets.Value("int64")}
    features |= {name: datasets.Value("bool") for name in CelebA.task.names}
    rows = {
        "image": [Image.fromarray(pixels(i, 44)[:, :36]) for i in range(count)],
        "celeb_id": list(range(count)),
        **{name: [one(j) for one in holds] for j, name in enumerate(CelebA.task.names)},
    }
    path.parent.mkdir(parents=True)
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(path)


def test_attributes_of_faces(root, tmp_path):
    holds = [lambda j: j % 2 == 0, lambda j: j == 39, lambda j: True]
    write_faces(root / "celeba" / "valid-00000-of-00001.parquet", holds)
    faces = CelebA(root, 24, tmp_path / "cache")
    images = faces.load("valid", 0, 3)
    assert images.labels.dtype == torch.uint8
    assert images.labels.tolist() == [[int(one(j)) for j in range(40)] for one in holds]
    assert images.raw().shape == (3, 3, 24, 24)
    assert faces.task.describe(images.labels[1]) == "Young"


def test_an_attribute_that_is_missing(root, tmp_path):
    write_faces(root / "celeba" / "train-00000-of-00001.parquet", [lambda j: None if j else True])
    with pytest.raises(DataError, match="image 0 has None for Arched_Eyebrows"):
        CelebA(root, 24, tmp_path / "cache").load("train", 0, 1)


def test_names_of_the_classes():
    assert Cifar100.task.outputs == len(set(Cifar100.task.names)) == 100
    assert (Cifar100.task.names[0], Cifar100.task.names[26]) == ("apple", "cra")
    assert ImageNet1k.task.outputs == 1000
    assert ImageNet1k.task.names[1] == "goldfish, Carassius auratus"
    assert CelebA.task.outputs == len(set(CelebA.task.names)) == 40


# The real ones ------------------------------------------------------------------------------------


def real(folder):
    places = [Path(place) for place in REAL if place]
    root = next((place for place in places if (place / folder).is_dir()), None)
    if root is None:
        pytest.skip(f"no folder {folder} in MIBENCH_DATA or ../shared/data")
    return root


@pytest.mark.real
def test_the_official_cifar10(tmp_path):
    images = Cifar10(real("cifar10"), 32, tmp_path).load("test", 0, 100)
    assert images.raw().shape == (100, 3, 32, 32)
    assert Cifar10.task.names[images.labels[0]] == "cat"
    assert images.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert set(images.labels.tolist()) == set(range(10))
    assert 0.3 < images.images().mean() < 0.6
    assert len(set(images.hashes())) == 100


@pytest.mark.real
@pytest.mark.parametrize(
    ("dataset", "folder", "split", "size"),
    [
        (Cifar100, "cifar100", "test", 32),
        (CelebA, "celeba", "test", 64),
        (ImageNet1k, "imagenet-1k", "validation", 64),
    ],
)
def test_the_others(tmp_path, dataset, folder, split, size):
    opened = dataset(real(folder), size, tmp_path)
    images = opened.load(split, 0, 100)
    assert images.raw().shape == (100, 3, size, size)
    assert 0.2 < images.images().mean() < 0.7
    schema = opened.opened(split).source.rows.table.features
    own = schema["label" if dataset is ImageNet1k else "fine_label"].names if (
        dataset is not CelebA
    ) else [name for name in schema if name not in ("image", "celeb_id")]  # fmt: skip
    assert tuple(own) == dataset.task.names
