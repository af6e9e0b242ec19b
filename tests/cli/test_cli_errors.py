import errno
import io
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from cli_words import PAIR, TINY
from PIL import Image

from mibench.record import read_record

PHOTOS = {
    "dataset": "cifar10",
    "image_size": 32,
    "train": {"split": "train", "start": 0, "count": 4},
    "auxiliary": {"split": "train", "start": 4, "count": 4},
    "validation": {"split": "train", "start": 8, "count": 2},
    "private": {"split": "test", "start": 0, "count": 2},
    "attacked": 2,
}
INCOMPLETE = """
from mibench.defenses.base import Defense
class Broken(Defense):
    'Lacks protect.'
"""
FAILING = """
from mibench.defenses.base import Defense
class Failing(Defense):
    'Fails in the middle.'
    def protect(self, images):
        raise IndexError('no such thing')
"""


def edited(path, **changes):
    values = yaml.safe_load(Path(TINY).read_text()) | changes
    path.write_text(yaml.safe_dump(values))
    return path


def frame(count, size=32):
    generator = np.random.default_rng(size + count)
    rows = []
    for _ in range(count):
        buffer = io.BytesIO()
        pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        rows.append({"bytes": buffer.getvalue(), "path": None})
    return pd.DataFrame({"img": rows, "label": [index % 10 for index in range(count)]})


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A data root with a whole small dataset, and the words of a run on it."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder = tmp_path / "data" / "cifar10"
    folder.mkdir(parents=True)
    frame(10).to_parquet(folder / "train-00000-of-00001.parquet")
    frame(2).to_parquet(folder / "test-00000-of-00001.parquet")
    protocol = edited(tmp_path / "photos.yaml", data=PHOTOS)
    words = ("run", "--defense", "none", "--attack", "decoder", "--protocol", protocol)
    return folder, (*words, "--data-root", folder.parent, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--attack", "diffusio"), "did you mean 'diffusion'"),
        (("--protocol", "cifar10-lite"), "did you mean 'cifar10-lite-v1'"),
        (("--protocol", "absent.yaml"), "no protocol file"),
        (("--set", "defense.densty=0.1"), "did you mean 'density'"),
        (("--set", "defense.density=dense"), "density"),
        (("--set", "attack.scales=[0.1"), "not valid YAML"),
        (("--set", "other.x=1"), "unknown root 'other'"),
        (("--set", "density"), "expected root.key=value"),
        (("--device", "nonsense"), "this machine has: "),
        (("--device", "meta"), "this machine has: "),
        (("--defense", "./absent.py:Any"), "there is no file"),
    ],
)
def test_bad_input_is_one_line(refused, words, said):
    assert said in refused(*PAIR, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_cuda_where_there_is_none(refused):
    assert "cannot compute on 'cuda'" in refused(*PAIR, "--device", "cuda")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": {"psnr": 1, "sim": 1}}, "did you mean 'ssim'"),
        ({"tittle": "x"}, "did you mean 'title'"),
        ({"data": PHOTOS | {"dataset": "cifar"}}, "cifar10"),
        ({"adversary": {"knowledge": "data_only"}}, "needs white_box"),
    ],
)
def test_a_bad_protocol_is_refused_before_anything_runs(refused, tmp_path, changes, said):
    path = edited(tmp_path / "bad.yaml", **changes)
    assert said in refused(*PAIR[:-1], path, "--out", "out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("source", "name", "said"),
    [
        ("raise RuntimeError('broken at import')", "Any", "broken at import"),
        ("def (:", "Any", "SyntaxError"),
        (INCOMPLETE, "Broken", "lacks protect"),
        (INCOMPLETE, "Absent", "Absent"),
        (FAILING, "Failing", "raised IndexError: no such thing"),
    ],
)
def test_a_broken_plugin_is_one_line(refused, tmp_path, source, name, said):
    (tmp_path / "plugin.py").write_text(source)
    words = ("run", "--defense", f"./plugin.py:{name}", "--attack", "decoder", "--protocol", TINY)
    assert said in refused(*words)


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").touch()
    assert "cannot write in" in refused(*PAIR, "--out", tmp_path / "file" / "out")


def test_a_full_disk(refused, finished, monkeypatch):
    """The disk fills up while the results are written."""
    import mibench.files

    real = mibench.files._write_new_and_replace

    def full(target, data):
        if target.name == "per_image.parquet":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(target, data)

    monkeypatch.setattr("mibench.files._write_new_and_replace", full)
    monkeypatch.setattr("mibench.evaluate.evaluate", lambda *_: finished.result)
    assert "the disk is full" in refused(*PAIR, "--out", "out")
    record = read_record(Path("out"))
    assert record.status == "error"
    assert "the disk is full" in record.error


def test_a_device_without_memory(refused, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr("mibench.evaluate.evaluate", full)
    assert "too little free memory" in refused(*PAIR, "--out", "out")


def test_the_record_of_another_run_is_not_overwritten(refused, finished):
    before = (finished.out / "record.json").read_bytes()
    line = refused(*PAIR, "--out", finished.out, "--set", "defense.density=0.125")
    assert "defense.density is 0.0625, here 0.125" in line
    assert "another --out" in line
    assert (finished.out / "record.json").read_bytes() == before


def test_files_of_the_user_stay(refused, invoke, monkeypatch, finished):
    Path("out").mkdir()
    Path("out/notes.txt").write_text("mine")
    monkeypatch.setattr("mibench.evaluate.evaluate", lambda *_: finished.result)
    assert invoke(*PAIR, "--out", "out").exit_code == 0
    assert Path("out/notes.txt").read_text() == "mine"


def test_a_record_that_cannot_be_read_is_not_overwritten(refused):
    Path("out").mkdir()
    Path("out/record.json").write_text("{")
    assert "not a readable record" in refused(*PAIR, "--out", "out")
    assert Path("out/record.json").read_text() == "{"


def test_the_small_data_set_itself_is_fine(invoke, photos):
    result = invoke(*photos[1])
    assert result.exit_code == 0, result.output


def _drop_split(folder):
    (folder / "test-00000-of-00001.parquet").unlink()


def _drop_column(folder):
    frame(10).drop(columns="label").to_parquet(folder / "train-00000-of-00001.parquet")


def _truncate(folder):
    path = folder / "train-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def _shrink(folder):
    frame(10, size=16).to_parquet(folder / "train-00000-of-00001.parquet")


def _shorten(folder):
    frame(5).to_parquet(folder / "train-00000-of-00001.parquet")


def _spoil(folder):
    bad = frame(10)
    bad.loc[3, "img"]["bytes"] = b"no image"
    bad.to_parquet(folder / "train-00000-of-00001.parquet")


def _mislabel(folder):
    bad = frame(10)
    bad.loc[2, "label"] = 10
    bad.to_parquet(folder / "train-00000-of-00001.parquet")


def _number(folder):
    frame(10).assign(img=1).to_parquet(folder / "train-00000-of-00001.parquet")


def _leak(folder):
    frame(10).head(2).to_parquet(folder / "test-00000-of-00001.parquet")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (_drop_split, "the split 'test' is missing"),
        (_drop_column, "has no column 'label'"),
        (_truncate, "cannot be read"),
        (_shrink, "16x16 pixels, but the protocol says 32x32"),
        (_shorten, "holds 5 images"),
        (_spoil, "image 3 is unreadable"),
        (_mislabel, "has the label 10"),
        (_number, "holds no images"),
        (_leak, "also in the role"),
    ],
)
def test_bad_data_is_one_line(refused, photos, tmp_path, harm, said):
    folder, words = photos
    harm(folder)
    assert said in refused(*words)
    record = read_record(tmp_path / "out")
    assert record.status == "error"
    assert said in record.error


def test_no_data_folder(refused, photos, tmp_path):
    words = [*photos[1], "--data-root", tmp_path / "absent"]
    assert "no folder" in refused(*words)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not a readable record"),
        ("[]", "no format_version"),
        (json.dumps({"format_version": 99}), "install a newer mibench"),
        (json.dumps({"format_version": 1, "colour": 1}), "not a valid record"),
        (None, "no record at"),
    ],
)
def test_show_of_something_else_is_one_line(refused, content, said):
    Path("some").mkdir()
    if content is not None:
        Path("some/record.json").write_text(content)
    assert said in refused("show", "some")
