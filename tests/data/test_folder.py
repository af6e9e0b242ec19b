"""A user's own folder: its classes, its splits, its roles, and one line for what is wrong."""

import os
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mibench.data.folder import Folder
from mibench.data.roles import load_roles, open_dataset
from mibench.data.rules import own_rule
from mibench.errors import DataError
from mibench.protocol import DataRule, RoleRule

SIZE = 8
LIKE = DataRule(
    dataset="procedural",
    image_size=SIZE,
    attacked=12,
    **{
        name: RoleRule(split="stream", start=100 * i, count=50)
        for i, name in enumerate(("train", "auxiliary", "validation", "private"))
    },
)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "my images [new]").mkdir()
    return tmp_path / "my images [new]"


def opened(root):
    return open_dataset(str(root), SIZE, None, root.parent / "cache")


@pytest.fixture
def fill(draw, png):
    """Writes images of these numbers into a folder."""

    def write(folder, numbers, suffix=".png"):
        folder.mkdir(parents=True, exist_ok=True)
        for number in numbers:
            data = png(draw(number, SIZE), "JPEG" if suffix == ".JPG" else "PNG")
            (folder / f"{number:04d}{suffix}").write_bytes(data)

    return write


@pytest.fixture
def parquet(draw, png):
    def write(path, rows, **columns):
        path.parent.mkdir(parents=True, exist_ok=True)
        cells = columns.pop("cells", None) or [png(draw(number, SIZE)) for number in rows]
        pq.write_table(pa.table({"photo": cells, **columns}), path)

    return write


def assert_holds(images, numbers, labels, draw):
    assert images.labels.tolist() == labels
    wanted = np.stack([draw(number, SIZE).transpose(2, 0, 1) for number in numbers])
    assert np.array_equal(images.raw().numpy(), wanted)


def load_all(root):
    found = opened(root)
    for split in found.splits:
        found.load(split, 0, found.size(split))


def refused(root, *words):
    with pytest.raises(DataError) as caught:
        load_all(root)
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


# Class subfolders ---------------------------------------------------------------------------------


def test_subfolders_are_classes_in_sorted_order(root, fill, draw):
    fill(root / "zebra", [1, 2])
    fill(root / "ant" / "deeper", [4, 3])
    (root / "ant" / "notes.txt").write_text("not an image")
    fill(root / ".hidden", [9])
    found = opened(root)
    assert isinstance(found, Folder)
    assert found.splits == ["train"]
    assert found.task.names == ("ant", "zebra")
    assert found.size("train") == 4
    assert_holds(found.load("train", 0, 4), [3, 4, 1, 2], [0, 0, 1, 1], draw)
    assert_holds(found.load("train", 1, 2), [4, 1], [0, 1], draw)


def test_no_file_is_lost_to_its_name(root, fill, draw, png):
    # Names that other libraries take for splits.
    fill(root / "a", range(3))
    (root / "a" / "test_1.png").write_bytes(png(draw(7, SIZE)))
    fill(root / "train", range(10, 13))
    found = opened(root)
    assert found.splits == ["train"]
    assert found.task.names == ("a", "train")
    assert found.size("train") == 7


@pytest.mark.parametrize("held_out", ["test", "validation", "val", "valid"])
def test_subfolders_may_be_splits(root, fill, draw, held_out):
    fill(root / "train" / "a", [0, 1])
    fill(root / "train" / "b", [2])
    fill(root / held_out / "b", [3])
    found = opened(root)
    split = "test" if held_out == "test" else "validation"
    assert sorted(found.splits) == sorted(["train", split])
    assert_holds(found.load("train", 0, 3), [0, 1, 2], [0, 0, 1], draw)
    assert_holds(found.load(split, 0, 1), [3], [1], draw)


def test_files_may_be_of_any_kind_and_size(root, fill, png):
    fill(root / "a", [0], suffix=".JPG")
    (root / "b").mkdir()
    (root / "b" / "wide.webp").write_bytes(png(Image.new("L", (40, 20), 9), "WEBP"))
    images = opened(root).load("train", 0, 2)
    assert images.raw().shape == (2, 3, SIZE, SIZE)


def test_the_identity_follows_from_the_content(root, fill, tmp_path):
    fill(root / "a", [0, 1])
    fill(root / "b", [2])
    before = opened(root).load("train", 0, 3).identity
    root.rename(tmp_path / "moved")
    assert opened(tmp_path / "moved").load("train", 0, 3).identity == before


def test_a_file_that_changes_is_read_anew(root, fill, draw, png):
    fill(root / "a", [0])
    fill(root / "b", [1])
    opened(root).load("train", 0, 2)
    (root / "a" / "0000.png").write_bytes(png(draw(5, SIZE)) + b" ")
    assert_holds(opened(root).load("train", 0, 2), [5, 1], [0, 1], draw)


def test_folders_that_look_alike_from_outside_are_told_apart(root, fill, draw, png, tmp_path):
    # Same names, sizes and times: only the content differs.
    for place, numbers in ((root, (0, 1)), (tmp_path / "other", (2, 3))):
        for name, number in zip("ab", numbers, strict=True):
            (place / name).mkdir(parents=True)
            file = place / name / "0.bmp"
            file.write_bytes(png(draw(number, SIZE), "BMP"))
            os.utime(file, (1, 1))
        assert_holds(opened(place).load("train", 0, 2), numbers, [0, 1], draw)


def test_files_that_change_places_change_labels(root, draw, png):
    files = []
    for name, number in (("a", 0), ("b", 1)):
        (root / name).mkdir()
        files.append(root / name / "0.bmp")
        files[-1].write_bytes(png(draw(number, SIZE), "BMP"))
        os.utime(files[-1], (1, 1))
    opened(root).load("train", 0, 2)
    files[0].rename(root / "kept")
    files[1].rename(files[0])
    (root / "kept").rename(files[1])
    assert_holds(opened(root).load("train", 0, 2), [1, 0], [0, 1], draw)


def test_touched_files_are_not_decoded_again(root, fill, tmp_path):
    fill(root / "a", [0])
    fill(root / "b", [1])
    opened(root).load("train", 0, 2)
    os.utime(root / "a" / "0000.png", (1, 1))
    opened(root).load("train", 0, 2)
    assert len(list((tmp_path / "cache" / "images").iterdir())) == 1


def test_links_that_lead_nowhere_are_unreadable_images(root, fill, noted):
    fill(root / "a", range(150))
    fill(root / "b", range(150, 300))
    (root / "a" / "gone.png").symlink_to(root / "nothing.png")
    assert len(opened(root).load("train", 0, 301)) == 300
    assert len(noted) == 1
    assert "1 unreadable images (a/gone.png)" in noted[0]
    for name in ("lost.png", "missing.png", "away.png"):
        (root / "b" / name).symlink_to(root / "nothing.png")
    refused(root, "4 of 304", "a/gone.png", "b/lost.png")


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode elsewhere")
@pytest.mark.parametrize("place", ["", "a", "c/x\udce9.png", "c\udce9/x.png", "c/d\udce9/x.png",
                                   "\udce9.png", "x\udce9.parquet"])  # fmt: skip
def test_names_that_are_not_utf8(root, fill, place):
    for name in "abc":
        fill(root / name, range(3))
    if place == "":
        root = root.rename(root.with_name("my\udce9"))
    elif place == "a":
        root = root.rename(root.with_name("mine"))
        (root.parent / "\udce9").mkdir()
        root = root.rename(root.parent / "\udce9" / "mine")
    else:
        (root / place).parent.mkdir(exist_ok=True)
        (root / "c" / "0000.png").rename(root / place)
    refused(root, "\\udce9", "not UTF-8", "rename")
    with pytest.raises(DataError) as caught:
        opened(root)
    str(caught.value).encode()  # so that it can be printed


@pytest.mark.parametrize("path", ["~nosuchuser/pics", "./" + "a" * 300, "./a\0b"])
def test_a_path_that_cannot_be(path, tmp_path):
    with pytest.raises(DataError, match="check the path") as caught:
        open_dataset(path, SIZE, None, tmp_path)
    assert "\n" not in str(caught.value)


def test_what_is_passed_over_is_told(root, fill, draw, png, noted, tmp_path):
    for split in ("train", "test"):
        for name in "ab":
            fill(root / split / name, range(3))
    fill(tmp_path / "elsewhere", [7, 8])
    (root / "train" / "none").mkdir()
    (root / "test" / "lost").symlink_to(tmp_path / "nowhere")
    for name in ("one", "two\udce9"):
        (root / "train" / "a" / name).symlink_to(tmp_path / "elsewhere")
    frames = [Image.fromarray(draw(number, SIZE)) for number in (1, 2)]
    film = png(frames[0], "PNG", save_all=True, append_images=frames[1:])
    (root / "train" / "b" / "film.png").write_bytes(film)
    found = opened(root)
    assert found.size("train") == 7
    for _ in range(2):  # decoded, and from the cache
        shown_before = len(noted)
        opened(root).load("train", 0, 7)
        notes = noted[shown_before:]
        assert len(notes) == 3
        assert "2 class folders hold no images (train/none, test/lost)" in notes[0]
        assert "2 links to folders" in notes[1]
        assert "train/a/one, train/a/two\\udce9" in notes[1]
        assert "of 1 animated images, the first frame is used" in notes[2]


def test_a_linked_class_folder_is_read(root, fill, draw, noted, tmp_path):
    fill(root / "a", [0])
    fill(tmp_path / "elsewhere", [7])
    (root / "b").symlink_to(tmp_path / "elsewhere")
    assert_holds(opened(root).load("train", 0, 2), [0, 7], [0, 1], draw)
    assert not noted


def test_a_parquet_file_beside_class_folders_is_ignored(root, fill, parquet, draw, noted):
    fill(root / "a", [0])
    fill(root / "b", [1])
    parquet(root / "meta.parquet", [5, 6], label=[0, 1])
    assert_holds(opened(root).load("train", 0, 2), [0, 1], [0, 1], draw)
    assert len(noted) == 1
    assert "1 parquet files are ignored" in noted[0]
    assert "meta.parquet" in noted[0]


def test_a_parquet_file_that_does_not_fit_is_named(root, fill, parquet):
    fill(root / "a", [0])
    parquet(root / "meta.parquet", [5, 6])
    refused(root, "meta.parquet", "no labels")


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_split_without_another(root, fill, split):
    fill(root / split / "a", [0])
    fill(root / split / "b", [1])
    refused(root, f"'{split}' only", "second split", "test/", "class folders")


def test_a_few_unreadable_images_are_left_out_and_named(root, fill, draw, noted):
    fill(root / "a", range(150))
    fill(root / "b", range(150, 300))
    (root / "a" / "0007.png").write_bytes(b"")
    (root / "b" / "0200.png").write_bytes(b"broken")
    found = opened(root)
    images = found.load("train", 0, 300)
    numbers = [n for n in range(300) if n not in (7, 200)]
    assert_holds(images, numbers, [int(n >= 150) for n in numbers], draw)
    assert len(found.load("train", 0, 300)) == 298
    assert len(noted) == 1
    for word in ("2 unreadable", "a/0007.png", "b/0200.png"):
        assert word in noted[0]


def test_many_unreadable_images_are_refused(root, fill):
    fill(root / "a", range(50))
    fill(root / "b", range(50, 100))
    for number in range(10, 18):
        (root / "a" / f"{number:04d}.png").write_bytes(b"broken")
    refused(root, "8 of 100", "a/0010.png", "a/0014.png, ...", "is unreadable")


def test_a_missing_folder(root):
    refused(root / "gone", "there is no folder", "gone")


def test_a_file_that_is_no_parquet_file(root):
    (root / "x.txt").write_text("x")
    refused(root / "x.txt", "neither a folder nor a parquet file")


def test_an_empty_folder(root):
    refused(root, "no images", "one subfolder")
    (root / "a").mkdir()
    (root / "a" / "x.txt").write_text("x")
    refused(root, "no images")


def test_one_class(root, fill):
    fill(root / "only", range(3))
    refused(root, "one class only (only)", "at least two")


def test_images_without_a_class(root, fill):
    fill(root, range(3))
    refused(root, "outside of class folders", "0000.png")
    fill(root / "a", range(3))
    refused(root, "outside of class folders")


def test_folders_beside_the_splits(root, fill):
    for name in ("train", "test", "extra"):
        fill(root / name / "a", [0])
        fill(root / name / "b", [1])
    refused(root, "'extra'", "beside its splits")


def test_a_split_that_is_not_there(root, fill):
    fill(root / "a", [0])
    fill(root / "b", [1])
    with pytest.raises(DataError, match="no split 'test' \\(it has train\\)"):
        opened(root).size("test")
    with pytest.raises(DataError, match="holds 2 images, but the protocol needs images 1 to 3"):
        opened(root).load("train", 1, 2)


# Parquet files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["cat", "dog", "ant", "cat"], ("ant", "cat", "dog")),
        ([10, 9, 2, 10], ("2", "9", "10")),
        ([True, False, False, True], ("False", "True")),
    ],
)
def test_columns_are_found_by_what_they_hold(root, parquet, draw, labels, names):
    parquet(root / "part.parquet", range(4), kind=labels, score=[0.5] * 4)
    found = opened(root)
    assert found.task.names == names
    assert_holds(found.load("train", 0, 4), range(4), [names.index(str(x)) for x in labels], draw)


def test_a_parquet_file_of_the_datasets_library(root, draw):
    kinds = {"y": datasets.ClassLabel(names=["b", "a"]), "pic": datasets.Image()}
    kinds["caption"] = datasets.Value("string")
    rows = {"y": [1, 0], "pic": [Image.fromarray(draw(n, SIZE)) for n in (0, 1)]}
    rows["caption"] = ["first", "second"]
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    table.to_parquet(root / "x.parquet")
    found = opened(root / "x.parquet")
    assert found.task.names == ("b", "a")
    assert_holds(found.load("train", 0, 2), [0, 1], [1, 0], draw)


def test_a_usual_name_decides_between_columns(root, parquet):
    parquet(root / "x.parquet", range(2), title=["p", "q"], Label=["v", "u"])
    assert opened(root).task.names == ("u", "v")


def test_parquet_files_are_splits_by_name_or_folder(root, parquet, draw):
    parquet(root / "data" / "train-00000-of-00002.parquet", [0, 1], label=["a", "b"])
    parquet(root / "data" / "train-00001-of-00002.parquet", [2], label=["a"])
    parquet(root / "data" / "val.parquet", [3], label=["c"])
    parquet(root / "test" / "0.parquet", [4], label=["b"])
    (root / "README.md").write_text("about")
    found = opened(root)
    assert sorted(found.splits) == ["test", "train", "validation"]
    assert found.task.names == ("a", "b", "c")
    assert_holds(found.load("train", 0, 3), [0, 1, 2], [0, 1, 0], draw)
    assert_holds(found.load("validation", 0, 1), [3], [2], draw)
    assert_holds(found.load("test", 0, 1), [4], [1], draw)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({}, ["no labels"]),
        ({"score": [0.1, 0.2]}, ["no labels"]),
        ({"name": ["a", "b"], "city": ["c", "d"]}, ["several columns", "name, city", "'label'"]),
        ({"label": ["a", "a"]}, ["one class only (a)"]),
        ({"label": ["a", None]}, ["without a label", "'label'"]),
        ({"cells": ["x", "y"], "label": [0, 1]}, ["no column of images", "photo, label"]),
        ({"cells": [b"x", b"y"], "label": [0, 1]}, ["no column of images"]),
    ],
)
def test_columns_that_do_not_fit(root, parquet, columns, words):
    parquet(root / "x.parquet", range(2), **columns)
    refused(root, *words)


def test_two_columns_of_images(root, parquet, draw, png):
    other = [png(draw(n, SIZE)) for n in range(2)]
    parquet(root / "x.parquet", range(2), mask=other, label=[0, 1])
    refused(root, "several columns of images (photo, mask)")


def test_a_file_beside_the_splits(root, parquet):
    for name in ("train", "test", "more"):
        parquet(root / f"{name}.parquet", range(2), label=[0, 1])
    refused(root, "more.parquet", "beside its splits")


def test_a_broken_parquet_file(root, parquet):
    parquet(root / "x.parquet", range(2), label=[0, 1])
    (root / "x.parquet").write_bytes((root / "x.parquet").read_bytes()[:-20])
    refused(root, "cannot be read", "x.parquet")


def test_an_unreadable_image_of_a_parquet_file(root, parquet, draw, png):
    cells = [png(draw(n, SIZE)) for n in range(10)]
    parquet(root / "x.parquet", [], cells=[*cells, b"no"], label=[0, 1] * 5 + [0])
    refused(root, "1 of 11", "image 10")


# Roles --------------------------------------------------------------------------------------------


def test_roles_of_one_split(root, fill, tmp_path):
    fill(root / "a", range(150))
    fill(root / "b", range(150, 300))
    found = opened(root)
    rule = own_rule(found, LIKE)
    assert rule.image_size == SIZE
    assert rule.strength == "disjoint"
    roles = load_roles(rule, None, tmp_path / "cache")
    sizes = {name: len(getattr(roles, name)) for name in DataRule.model_fields if name in
             ("train", "auxiliary", "validation", "private")}  # fmt: skip
    assert sum(sizes.values()) == 300
    assert sizes["train"] > sizes["auxiliary"] > sizes["private"]
    assert rule.attacked == min(12, sizes["private"])
    assert roles.task.names == ("a", "b")


@pytest.mark.parametrize("held_out", ["test", "validation"])
def test_the_folders_own_test_images_are_private(root, fill, tmp_path, held_out):
    for place, part in (("a", range(60)), ("b", range(60, 120))):
        fill(root / "train" / place, part)
    fill(root / held_out / "a", range(200, 205))
    fill(root / held_out / "b", range(205, 209))
    rule = own_rule(opened(root), LIKE)
    assert rule.attacked == 9
    roles = load_roles(rule, None, tmp_path / "cache")
    assert len(roles.private) == 9
    assert len(roles.train) + len(roles.auxiliary) + len(roles.validation) == 120
    assert set(roles.private.labels.tolist()) == {0, 1}


def test_a_folder_in_the_working_directory(root, fill, monkeypatch):
    fill(root / "a", range(60))
    fill(root / "b", range(60, 120))
    monkeypatch.chdir(root.parent)
    rule = own_rule(open_dataset(f"./{root.name}", SIZE, None, root.parent / "cache"), LIKE)
    assert isinstance(open_dataset(rule.dataset, SIZE, None, root.parent / "cache"), Folder)


def test_the_rule_names_the_images_that_are_meant(root, fill, tmp_path):
    for place, part in (("a", range(60)), ("b", range(60, 120))):
        fill(root / place, part)
    rule = own_rule(opened(root), LIKE)
    roles = load_roles(rule, None, tmp_path / "cache")
    names = ("train", "auxiliary", "validation", "private")
    assert all(getattr(rule, name).identity == getattr(roles, name).identity for name in names)
    assert own_rule(opened(root), LIKE) == rule
    fill(root / "a", range(500, 510))
    assert own_rule(opened(root), LIKE) != rule


def test_copies_among_the_private_images_are_attacked_once(root, fill):
    for place, part in (("a", range(20)), ("b", range(20, 40))):
        fill(root / "train" / place, part)
    fill(root / "test" / "a", [100, 101, 102])
    for path in sorted((root / "test" / "a").iterdir()):
        (path.parent / f"again-{path.name}").write_bytes(path.read_bytes())
    fill(root / "test" / "b", [103])
    assert own_rule(opened(root), LIKE).attacked == 4


def test_too_few_images_for_roles(root, fill):
    fill(root / "train" / "a", range(5))
    fill(root / "train" / "b", range(5, 9))
    fill(root / "test" / "a", [20])
    with pytest.raises(DataError, match="too few images"):
        own_rule(opened(root), LIKE)
