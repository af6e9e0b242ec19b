"""The cache of decoded images: equal on every way, resumable, repaired, and flat in memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import safetensors.numpy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mibench.data import decoded
from mibench.data.decoded import Decoded, Source
from mibench.data.images import Decoder, UnfitImageError
from mibench.data.tables import Rows
from mibench.errors import DataError, InvalidParamsError, StorageError

COUNT, SIZE = 29, 8


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(decoded, "SHARD", 8)
    monkeypatch.setattr(decoded, "BATCH", 3)


class Labels:
    """Labels that are counted, and may fail."""

    def __init__(self):
        self.seen, self.fatal, self.bad = [], None, set()

    def __call__(self, row):
        number = row["number"]
        if self.fatal is not None and number >= self.fatal:
            raise KeyboardInterrupt
        if number in self.bad:
            raise UnfitImageError("has no label")
        self.seen.append(number)
        return torch.tensor(number % 10)


def table(images):
    cells = [{"bytes": image, "path": None} for image in images]
    features = {"image": datasets.Image(decode=False), "number": datasets.Value("int64")}
    return datasets.Dataset.from_dict(
        {"image": cells, "number": list(range(len(images)))}, features=datasets.Features(features)
    )


@pytest.fixture
def encoded_images(draw, png):
    return [png(draw(index, 8 + index % 3)) for index in range(COUNT)]


@pytest.fixture
def source(encoded_images):
    return Source(
        title="things",
        origin={"dataset": "things"},
        rows=Rows(table(encoded_images), "image"),
        image_column="image",
        label=Labels(),
        blank=torch.tensor(-1),
        decoder=Decoder(SIZE),
    )


@pytest.fixture
def streamed(monkeypatch):
    """Makes one for which the disk has no room."""

    def make(source, cache):
        found = Decoded(source, cache)
        monkeypatch.setattr(found, "_has_room", lambda _: False)
        found.load(0, COUNT)
        return found

    return make


def test_the_environment_says_how_much_disk_may_be_used(source, tmp_path, monkeypatch):
    sizes = []
    for limit in ("0", "0.000004", "1"):
        monkeypatch.setenv(decoded.LIMIT, limit)
        Decoded(source, tmp_path / limit).load(0, COUNT)
        sizes.append(sum(file.stat().st_size for file in shards(tmp_path / limit)))
    assert sizes[0] == sizes[1] < sizes[2] - 0.9 * COUNT * 3 * SIZE * SIZE


def shards(cache):
    return sorted(cache.rglob("*.safetensors"))


def test_kept_streamed_and_direct_images_are_equal(source, encoded_images, tmp_path, streamed):
    kept = Decoded(source, tmp_path / "kept")
    kept.load(0, COUNT)
    other = streamed(source, tmp_path / "streamed")
    size = {cache: sum(file.stat().st_size for file in shards(tmp_path / cache))
            for cache in ("kept", "streamed")}  # fmt: skip
    assert size["kept"] - size["streamed"] > COUNT * 3 * SIZE * SIZE * 0.9

    @settings(max_examples=60, deadline=None)
    @given(st.data())
    def equal(data):
        start = data.draw(st.integers(0, COUNT - 1))
        count = data.draw(st.integers(1, COUNT - start))
        index = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), max_size=20)), dtype=int)
        one, two = kept.load(start, count)[0], other.load(start, count)[0]
        direct = [Decoder(SIZE)(encoded_images[start + i]) for i in index.tolist()]
        wanted = torch.stack(direct) if direct else torch.empty(0, 3, SIZE, SIZE, dtype=torch.uint8)
        assert torch.equal(one.raw(index), wanted)
        assert torch.equal(two.raw(index), wanted)
        assert one.labels.tolist() == [i % 10 for i in range(start, start + count)]
        assert one.hashes() == two.hashes()
        assert one.identity == two.identity

    equal()


def test_only_shards_of_the_range_are_made_and_they_are_shared(source, tmp_path):
    Decoded(source, tmp_path).load(9, 10)
    assert [file.stem for file in shards(tmp_path)] == ["000001", "000002"]
    assert sorted(source.label.seen) == list(range(8, 24))
    source.label.seen.clear()
    images, unfit, _ = Decoded(source, tmp_path).load(0, 20)
    assert sorted(source.label.seen) == list(range(8))
    assert len(images) == 20
    assert not unfit


def test_interrupted_decoding_goes_on_at_the_next_shard(source, tmp_path):
    source.label.fatal = 20
    with pytest.raises(KeyboardInterrupt):
        Decoded(source, tmp_path).load(0, COUNT)
    before = {file: file.stat().st_mtime_ns for file in shards(tmp_path)}
    assert [file.stem for file in before] == ["000000", "000001"]
    assert {file.parent.name for file in before} == {source.key}
    source.label.fatal = None
    source.label.seen.clear()
    images, _, _ = Decoded(source, tmp_path).load(0, COUNT)
    assert sorted(source.label.seen) == list(range(16, COUNT))
    assert before == {file: file.stat().st_mtime_ns for file in before}
    assert images.labels.tolist() == [i % 10 for i in range(COUNT)]
    assert not [file for file in tmp_path.rglob("*") if file.suffix == ".tmp"]


@pytest.mark.parametrize("keep", [0, 5, 0.3, 0.9, "one byte less"])
def test_a_truncated_shard_is_made_again(source, tmp_path, keep):
    wanted = Decoded(source, tmp_path).load(0, COUNT)[0]
    data = shards(tmp_path)[1].read_bytes()
    cut = len(data) - 1 if isinstance(keep, str) else int(keep * len(data)) if keep < 1 else keep
    shards(tmp_path)[1].write_bytes(data[:cut])
    source.label.seen.clear()
    again = Decoded(source, tmp_path).load(0, COUNT)[0]
    assert sorted(source.label.seen) == list(range(8, 16))
    assert torch.equal(again.raw(), wanted.raw())
    assert again.identity == wanted.identity


def tensor_at(shard, name):
    """Where a tensor of a safetensors file starts and ends."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return [8 + length + at for at in json.loads(data[8 : 8 + length])[name]["data_offsets"]]


def test_a_changed_bit_of_an_image_is_found_when_it_is_read(source, tmp_path):
    Decoded(source, tmp_path).load(0, COUNT)
    data = bytearray(shards(tmp_path)[2].read_bytes())
    data[tensor_at(shards(tmp_path)[2], "pixels")[0]] ^= 1
    shards(tmp_path)[2].write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        Decoded(source, tmp_path).load(0, COUNT)[0].raw()


@pytest.mark.parametrize("name", ["labels", "digests", "readable", "animated"])
def test_a_changed_bit_beside_the_images_makes_a_shard_again(source, tmp_path, name):
    wanted = Decoded(source, tmp_path).load(0, COUNT)[0]
    data = bytearray(shards(tmp_path)[1].read_bytes())
    data[tensor_at(shards(tmp_path)[1], name)[0]] ^= 1
    shards(tmp_path)[1].write_bytes(data)
    source.label.seen.clear()
    again = Decoded(source, tmp_path).load(0, COUNT)[0]
    assert sorted(source.label.seen) == list(range(8, 16))
    assert again.identity == wanted.identity


def test_shards_that_changed_places_are_made_again(source, tmp_path):
    wanted = Decoded(source, tmp_path).load(0, COUNT)[0]
    first, second = shards(tmp_path)[:2]
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)
    assert Decoded(source, tmp_path).load(0, COUNT)[0].identity == wanted.identity


def test_a_shard_with_images_of_another_shape_is_made_again(source, tmp_path):
    wanted = Decoded(source, tmp_path).load(0, COUNT)[0]
    with safetensors.safe_open(shards(tmp_path)[0], "np") as file:
        check, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    held["pixels"] = held["pixels"][:, :, :4]
    safetensors.numpy.save_file(held, shards(tmp_path)[0], check)
    assert torch.equal(Decoded(source, tmp_path).load(0, COUNT)[0].raw(), wanted.raw())


def test_a_shard_that_vanishes_while_in_use_is_one_line(source, tmp_path):
    images, _, _ = Decoded(source, tmp_path).load(0, COUNT)
    shards(tmp_path)[0].unlink()
    with pytest.raises(StorageError, match="cannot read"):
        images.raw()


def test_unfit_rows_are_left_out_and_named(source, encoded_images, tmp_path, streamed):
    encoded_images[3] = b"nothing"
    source = Source(**{**vars(source), "rows": Rows(table(encoded_images), "image")})
    source.label.bad = {11}
    for found in (Decoded(source, tmp_path / "a"), streamed(source, tmp_path / "b")):
        images, unfit, reason = found.load(2, 12)
        assert unfit == [3, 11]
        assert "unreadable" in reason
        assert len(images) == len(images.labels) == len(images.hashes()) == 10
        assert torch.equal(images.raw(torch.tensor([1]))[0], Decoder(SIZE)(encoded_images[4]))
        assert found.load(4, 4)[1] == []


def test_what_failed_for_a_while_is_not_remembered(source, tmp_path):
    source.label.bad = {5}
    assert Decoded(source, tmp_path).load(0, 8)[1] == [5]
    source.label.bad = set()
    assert Decoded(source, tmp_path).load(0, 8)[1] == []


def test_streamed_shards_get_images_once_there_is_room(source, tmp_path, streamed):
    wanted = streamed(source, tmp_path).load(0, COUNT)[0]
    before = sum(file.stat().st_size for file in shards(tmp_path))
    found = Decoded(source, tmp_path).load(0, COUNT)[0]
    assert sum(file.stat().st_size for file in shards(tmp_path)) > before
    assert torch.equal(found.raw(), wanted.raw())


def test_never_more_than_half_of_the_free_disk(source, tmp_path, monkeypatch):
    monkeypatch.setattr(decoded.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 5000}))
    Decoded(source, tmp_path).load(0, COUNT)
    assert sum(file.stat().st_size for file in shards(tmp_path)) < COUNT * 3 * SIZE * SIZE


@pytest.mark.parametrize("value", ["many", "-1", "nan"])
def test_a_limit_that_is_no_number(source, tmp_path, monkeypatch, value):
    monkeypatch.setenv(decoded.LIMIT, value)
    with pytest.raises(InvalidParamsError, match=decoded.LIMIT):
        Decoded(source, tmp_path).load(0, COUNT)


def test_another_source_size_or_decoder_has_another_key(source):
    others = [{"origin": {"dataset": "x"}}, {"decoder": Decoder(9)}, {"decoder": Decoder(8, True)}]
    keys = {Source(**{**vars(source), **other}).key for other in others}
    assert len(keys | {source.key}) == 4


RSS = """
import io, sys
from pathlib import Path
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from mibench.data import decoded, tables
from mibench.data.images import Decoder

torch.set_num_threads(1)
decoded.SHARD = 128
tables.RELEASED = 2**22
draws = np.random.default_rng(0)

def png(i):
    pixels = draws.integers(0, 256, (128, 128, 3), np.uint8)  # as large encoded as decoded
    pixels[0, 0, 0] = i % 256
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", compress_level=0)
    return {"bytes": data.getvalue(), "path": None}

def write(count, file):
    kind = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]))])
    with pq.ParquetWriter(file, kind) as writer:
        for start in range(0, count, 64):
            cells = [png(i) for i in range(start, start + 64)]
            writer.write_table(pa.table({"image": cells}, kind))

def peak(count, folder):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    table = tables.encoded(tables.read_parquet([folder / f"{count}.parquet"], "t"), "image", "t")
    rows = tables.Rows(table, "image")
    label = lambda row: torch.tensor(0)
    source = decoded.Source("t", {"n": count}, rows, "image", label, label(0), Decoder(128))
    images, _, _ = decoded.Decoded(source, folder).load(0, count)
    order = torch.randperm(count)
    for start in range(0, count, 64):
        batch = images.raw(order[start : start + 64])
        assert int(batch[0, 0, 0, 0]) == int(order[start]) % 256
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

folder = Path(sys.argv[1])
for count in (128, 256, 2048):
    write(count, folder / f"{count}.parquet")
    tables.read_parquet([folder / f"{count}.parquet"], "t")  # the library's own copy, once
peak(128, folder)
print(peak(256, folder), peak(2048, folder))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory in Linux's unit")
def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    here = {
        **os.environ,
        "PYTHONPATH": str(Path(decoded.__file__).parents[2]),
        "HF_DATASETS_CACHE": str(tmp_path / "hf"),
    }
    run = subprocess.run(
        [sys.executable, "-c", RSS, str(tmp_path)],
        capture_output=True, text=True, check=False, env=here,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    few, many = map(float, run.stdout.split())
    pixels = (2048 - 256) * 3 * 128 * 128 / 2**20
    assert pixels > 80
    assert many - few < 30
