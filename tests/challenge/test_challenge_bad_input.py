"""What is wrong is said in one line, all of it at once, and nothing is written."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from challenge_runs import protocol_of_tests
from PIL import Image

from mibench.challenge import open_challenge, save_reconstructions
from mibench.challenge.export import Belongs, export, find_record, record_of
from mibench.challenge.pictures import read_reconstructions
from mibench.challenge.schema import read_challenge
from mibench.errors import (
    DataError,
    InvalidParamsError,
    MibenchError,
    PluginError,
    RecordError,
    StorageError,
)
from mibench.job import Job
from mibench.outputs import write_record
from mibench.record import SuitePart


def picture(path, side=32, mode="RGB"):
    Image.new(mode, (side, side)).save(path, format="PNG")


def sixteen_bits(path):
    """An RGB PNG of 16 bits a value, which Pillow would take for one of 8."""
    import struct
    import zlib

    def chunk(kind, data):
        whole = kind + data
        return struct.pack(">I", len(data)) + whole + struct.pack(">I", zlib.crc32(whole))

    rows = b"".join(b"\0" + bytes(32 * 6) for _ in range(32))
    head = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def link(path):
    target = path.with_name("0001.png")
    path.unlink()
    path.symlink_to(target)


def folder(path):
    path.unlink()
    path.mkdir()


SPOILT = {
    "missing": (lambda path: path.unlink(), "0003.png is missing"),
    "size": (lambda path: picture(path, 16), "0003.png is 16x16 RGB, not 32x32 RGB"),
    "grey": (lambda path: picture(path, mode="L"), "0003.png is 32x32 L, not 32x32 RGB"),
    "alpha": (lambda path: picture(path, mode="RGBA"), "0003.png is 32x32 RGBA, not"),
    "palette": (lambda path: picture(path, mode="P"), "0003.png is 32x32 P of 1 bits, not"),
    "deep": (sixteen_bits, "0003.png is 32x32 RGB of 16 bits, not 32x32 RGB"),
    "text": (lambda path: path.write_text("no picture"), "0003.png is no readable PNG"),
    "empty": (lambda path: path.write_bytes(b""), "0003.png is no readable PNG"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:60]), "0003.png is no readable PNG"),
    "jpeg": (
        lambda path: Image.new("RGB", (32, 32)).save(path, format="JPEG"),
        "0003.png is no readable PNG",
    ),
    "large": (
        lambda path: path.write_bytes(path.read_bytes() + bytes(2**15)),
        "0003.png has",
    ),
    "link": (link, "0003.png is a symbolic link"),
    "folder": (folder, "0003.png is no plain file"),
    "extra": (lambda path: picture(path.with_name("0012.png")), "0012.png is not asked for"),
    "stranger": (
        lambda path: path.with_name("evil.pkl").write_bytes(b"\x80\x04."),
        "evil.pkl is not asked for",
    ),
    "inside": (lambda path: path.with_name("more").mkdir(), "more is not asked for"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_folder_is_refused(how, opened, sent):
    spoil, told = SPOILT[how]
    read_reconstructions(sent, opened.challenge)  # whole before
    spoil(sent / "0003.png")
    with pytest.raises(DataError) as caught:
        read_reconstructions(sent, opened.challenge)
    assert told in str(caught.value)
    assert str(caught.value).count(".png") + str(caught.value).count(" not asked") <= 2


def test_all_problems_are_told_at_once(opened, sent):
    picture(sent / "0000.png", 16)
    (sent / "0001.png").unlink()
    (sent / "0002.png").write_text("no picture")
    picture(sent / "extra\n\x1b[31m.png")
    with pytest.raises(DataError) as caught:
        read_reconstructions(sent, opened.challenge)
    told = str(caught.value)
    for words in ("0000.png is 16x16", "0001.png is missing", "0002.png is no readable", "extra"):
        assert words in told
    assert "\x1b" not in told
    assert "\n" not in told


def test_very_many_problems_are_counted(opened, tmp_path):
    (tmp_path / "sent").mkdir()
    for index in range(40):
        (tmp_path / "sent" / f"junk{index}").touch()
    with pytest.raises(DataError, match="and 32 more"):
        read_reconstructions(tmp_path / "sent", opened.challenge)


@pytest.mark.parametrize("kind", ["nowhere", "file", "link"])
def test_a_folder_that_is_none(kind, opened, sent, tmp_path):
    place = tmp_path / "place"
    if kind == "file":
        place.touch()
    if kind == "link":
        place.symlink_to(sent)
    with pytest.raises(DataError, match="there is no folder"):
        read_reconstructions(place, opened.challenge)


def test_what_was_saved_is_what_is_read(opened, tmp_path):
    images = torch.rand(12, 3, 32, 32)
    save_reconstructions(images, tmp_path / "sent")
    found, _ = read_reconstructions(tmp_path / "sent", opened.challenge)
    np.testing.assert_array_equal(found * 255, (images * 255).round())


# --- the challenge's own folder ------------------------------------------------------------------


def edit(copy, change):
    values = yaml.safe_load((copy / "challenge.yaml").read_text())
    change(values)
    (copy / "challenge.yaml").write_text(yaml.safe_dump(values))


def test_the_file_is_read_as_it_was_written(made, several):
    for one in (made, several):
        found = read_challenge(one.folder)
        assert found.to_yaml() == (one.folder / "challenge.yaml").read_bytes()
        assert found.record == one.record.id
        assert found.rebuilt_protocol().content_id == one.job.protocol.content_id


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda v: v.update(format_version=2), RecordError, "format version 2"),
        (lambda v: v.pop("format_version"), RecordError, "no format_version"),
        (lambda v: v.update(extra=1), InvalidParamsError, "extra"),
        (lambda v: v.pop("messages"), InvalidParamsError, "messages"),
        (lambda v: v.update(images="many"), InvalidParamsError, "images"),
        (lambda v: v["protocol"]["values"].update(batch=9), RecordError, "it was edited"),
        (lambda v: v["files"].pop("README.md"), RecordError, "must name"),
        (lambda v: v["files"].update({"../out": "0" * 64}), RecordError, "must name"),
        (lambda v: v["defense"].update(code="0" * 16), PluginError, "has the code"),
        (lambda v: v["defense"].update(name="noice"), MibenchError, "noise"),
        (lambda v: v["granted"].pop(), RecordError, "does not fit"),
        (lambda v: v["withheld"].append("client.x"), RecordError, "does not fit"),
        (lambda v: v["messages"][0].update(name="else"), RecordError, "does not hold the share"),
        (lambda v: v.update(images=11), RecordError, "does not hold the share"),
    ],
)
def test_an_edited_challenge_is_refused(copy, change, error, told):
    edit(copy, change)
    with pytest.raises(error, match=told):
        open_challenge(copy)


@pytest.mark.parametrize("name", ["shares.safetensors", "weights.safetensors", "README.md"])
def test_other_files_are_refused(copy, name):
    data = bytearray((copy / name).read_bytes())
    data[-1] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(RecordError, match="is not the file that the challenge was written with"):
        open_challenge(copy)
    (copy / name).unlink()
    with pytest.raises(RecordError, match="restore it"):
        open_challenge(copy)


def test_no_challenge(tmp_path):
    with pytest.raises(RecordError, match="no challenge at"):
        open_challenge(tmp_path)
    (tmp_path / "challenge.yaml").write_text("- just\n- a list\n")
    with pytest.raises(RecordError, match="is no challenge"):
        open_challenge(tmp_path)
    (tmp_path / "challenge.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecordError, match="not a readable text file"):
        open_challenge(tmp_path)


# --- exporting -----------------------------------------------------------------------------------


def exported(made, out, **changes):
    record = made.record.model_copy(update=changes)
    belongs = Belongs(made.record.id, record, made.run)
    return export(made.job, belongs, made.store, None, "cpu", out)


def test_nothing_is_exported_of_the_undefended_split(made, tmp_path):
    job = Job(made.job.protocol, "none", "linear", {}, {})
    with pytest.raises(InvalidParamsError, match="protects nothing"):
        export(job, made.belongs(), made.store, None, "cpu", tmp_path / "out")


def test_a_folder_that_is_not_empty_is_left_alone(made, tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(StorageError, match="is not empty"):
        exported(made, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_other_weights_than_the_records_are_refused(made, tmp_path):
    facts = made.record.defense_facts | {"trained_weights": "0" * 16}
    with pytest.raises(RecordError, match="other weights"):
        exported(made, tmp_path / "out", defense_facts=facts)
    assert not (tmp_path / "out").exists()


def test_other_servers_than_the_records_are_refused(made, tmp_path):
    adversary = made.record.adversary.model_copy(update={"corrupted": [1]})
    with pytest.raises(RecordError, match="is of other servers"):
        exported(made, tmp_path / "out", adversary=adversary)


def test_other_images_than_the_records_are_refused(made, tmp_path):
    data = made.record.data
    data = data.model_copy(update={"identities": data.identities | {"private": "0" * 16}})
    with pytest.raises(DataError, match="not those of the record"):
        exported(made, tmp_path / "out", data=data)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"defense": "dropout"}, "the defense is noise there and dropout here"),
        ({"defense_params": {"snr_db": 3.0}}, "other parameters"),
        ({"seed": 1}, "the seed is 0 there and 1 here"),
        ({"protocol": protocol_of_tests(batch=9)}, "the protocol's content"),
    ],
)
def test_the_record_of_another_job_is_refused(made, tmp_path, change, told):
    parts = {
        "protocol": made.job.protocol, "defense": "noise", "attack": "linear",
        "defense_params": {}, "attack_params": {},
    }  # fmt: skip
    job = Job(**(parts | change))
    with pytest.raises(RecordError, match=told):
        record_of(job, tmp_path, made.run)


def test_a_board_without_the_record(made, tmp_path):
    with pytest.raises(RecordError, match=r"no record in .* is of defense noise"):
        record_of(made.job, tmp_path, None)


def test_of_several_records_the_suites_is_taken(made, tmp_path):
    part = SuitePart(attack="linear", scores=made.record.scores)
    suite = made.record.model_copy(update={"suite": [part]})
    stronger = made.record.model_copy(
        update={
            "leakage": [
                one.model_copy(update={"value": None if one.value is None else one.value + 1})
                for one in made.record.leakage
            ],
        }
    )
    newer = suite.model_copy(update={"supersedes": suite.id})
    for records, wanted in (
        ([made.record], made.record),
        ([made.record, stronger], stronger),
        ([made.record, stronger, suite], suite),
        ([made.record, stronger, suite, newer], newer),
    ):
        for one in records:
            place = tmp_path / "v1" / "records" / one.id
            place.mkdir(parents=True, exist_ok=True)
            write_record(one, place)
        assert record_of(made.job, tmp_path / "v1", None).id == wanted.id
    assert find_record(made.record.id, tmp_path / "v1", None).record == made.record


def test_a_folder_with_another_record_is_refused(made, tmp_path):
    with pytest.raises(RecordError, match="and not 0123456789abcdef"):
        find_record("0123456789abcdef", tmp_path, made.run)


def test_edited_values_beside_the_record_are_refused(made, sent, tmp_path):
    from mibench.board.model import Origin
    from mibench.challenge.score import score_answer

    run = shutil.copytree(made.run, tmp_path / "run")
    challenge = read_challenge(made.folder)
    belongs = Belongs(made.record.id, made.record, run)

    def score():
        return score_answer(challenge, belongs, sent, Origin(), "x", made.store, None)

    assert score().best.scores
    table = pd.read_parquet(run / "per_image.parquet")
    table.assign(prior_only_psnr=0.0).to_parquet(run / "per_image.parquet", index=False)
    with pytest.raises(RecordError, match="not the file that the record was written with"):
        score()
    (run / "per_image.parquet").unlink()
    with pytest.raises(RecordError, match=r"has no per_image.parquet"):
        score()
