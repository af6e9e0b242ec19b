"""What may lie in the folder of a leaderboard, and what is put there."""

import hashlib
import io
import json
import shutil
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from board_runs import base, numbers, put, row_on, run_folder
from PIL import Image

from mibench.artifacts import ArtifactStore
from mibench.board import entries, layout
from mibench.board.gallery import webp_size
from mibench.board.model import CheckLine, Level, Origin, Verification
from mibench.errors import BoardError
from mibench.outputs import PER_IMAGE, RECORD


@pytest.fixture
def root(tmp_path):
    return tmp_path / "leaderboard" / "v1"


@pytest.fixture
def entry(root):
    """The folder of one record."""
    return layout.record_folder(root, row_on(root, defense="vib"))


def refused(root):
    with pytest.raises(BoardError) as error:
        entries.read(root)
    return str(error.value)


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2, sort_keys=True))


def test_what_is_right_is_read(root, entry):
    found = entries.read(root)
    assert list(found.held) == [entry.name]
    held = found.held[entry.name]
    assert held.record.id == held.listed.id == entry.name
    assert len(held.table) == 128


def test_an_edited_record_is_refused(root, entry):
    values = json.loads((entry / RECORD).read_text())
    values["scores"][2]["value"] = 0.01
    (entry / RECORD).write_text(json.dumps(values))
    assert f"{entry / RECORD}: its content has the id" in refused(root)


def test_a_record_that_is_written_in_another_way_is_refused(root, entry):
    (entry / RECORD).write_text(json.dumps(json.loads((entry / RECORD).read_text())))
    assert "it is not as a run writes it" in refused(root)


def test_edited_values_per_image_are_refused(root, entry):
    with (entry / PER_IMAGE).open("ab") as file:
        file.write(b"\0")
    assert f"{entry / PER_IMAGE}: it is not the file that the record was written with" in refused(
        root
    )


@pytest.mark.parametrize(
    ("name", "data", "why"),
    [
        ("weights.pkl", b"\x80\x04.", "only record.json, per_image.parquet, entry.json"),
        ("notes.txt", b"hello", "only record.json, per_image.parquet, entry.json"),
        ("gallery.webp", b"RIFF0000WEBP", "entry.json does not name it"),
        ("gallery.webp", b"0" * (layout.LARGEST_GALLERY + 1), "are allowed"),
    ],
)
def test_what_does_not_belong_beside_a_record_is_refused(root, entry, name, data, why):
    (entry / name).write_bytes(data)
    told = refused(root)
    assert f"{entry / name}: " in told
    assert why in told


def test_a_link_is_refused_wherever_it_leads(root, entry, tmp_path):
    elsewhere = tmp_path / "elsewhere.json"
    (entry / layout.ENTRY).rename(elsewhere)
    (entry / layout.ENTRY).symlink_to(elsewhere)
    assert f"{entry / layout.ENTRY}: it is a link" in refused(root)


def test_a_linked_folder_is_refused(root, entry, tmp_path):
    moved = entry.rename(tmp_path / entry.name)
    entry.symlink_to(moved, target_is_directory=True)
    assert f"{entry}: records lie in folders" in refused(root)


@pytest.mark.parametrize("name", ["../outside", "ABCDEF0123456789", "0123"])
def test_a_folder_that_is_no_id_is_refused(root, entry, name):
    if name.startswith(".."):
        with pytest.raises(BoardError, match="there is no record"):
            entries.read_entry(root, name)
        return
    shutil.copytree(entry, entry.parent / name)
    assert "records lie in folders that are named by their id" in refused(root)


def test_a_folder_under_another_id_is_refused(root, entry):
    shutil.copytree(entry, entry.parent / ("0" * 16))
    told = refused(root)
    assert f"its content has the id {entry.name}" in told
    assert f"it belongs to record '{entry.name}'" in told


def test_broken_entries_are_named_with_the_field(root, entry):
    edit(entry / layout.ENTRY, extra=1)
    assert f"{entry / layout.ENTRY}: " in refused(root)
    assert "entry.extra" in refused(root)


def test_all_problems_are_told_at_once(root, entry):
    other = layout.record_folder(root, row_on(root, defense="mid"))
    (entry / "a.pkl").write_bytes(b"")
    (other / PER_IMAGE).unlink()
    (root / "stray.txt").write_text("x")
    layout.advisories(root).mkdir()
    (layout.advisories(root) / "A.yaml").write_text("id: B\ndate: d\ntitle: t\ntext: t\n")
    (layout.advisories(root) / "no.txt").write_text("")
    layout.best_known(root).mkdir()
    (layout.best_known(root) / "x.json").write_text("{}")
    told = refused(root)
    for part in (
        f"{entry / 'a.pkl'}: only",
        f"{other}: per_image.parquet is missing",
        f"{root / 'stray.txt'}: only the folders",
        "A.yaml: its id is 'B'",
        "no.txt: only files that end in .yaml",
        "x.json",
    ):
        assert part in told


def test_a_gallery_must_be_the_one_that_is_named(root, entry):
    gallery = {"sha256": "0" * 64, "side": 32, "columns": ["original", "vib"], "images": [0]}
    edit(entry / layout.ENTRY, gallery=gallery, gallery_reason=None)
    assert "it is missing, and entry.json names it" in refused(root)
    (entry / layout.GALLERY).write_bytes(b"\x89PNG")
    told = refused(root)
    assert "it is no WebP picture" in told
    assert "it is not the picture that entry.json names" in told


def drawn(entry, size, **gallery):
    """Puts a picture of one colour beside a record, as by hand."""
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "WEBP", lossless=True)
    (entry / layout.GALLERY).write_bytes(buffer.getvalue())
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    told = {"sha256": digest, "side": 32, "columns": ["original", "vib"], "images": [0]} | gallery
    edit(entry / layout.ENTRY, gallery=told, gallery_reason=None)


@pytest.mark.parametrize("how", [{"lossless": True}, {"quality": 50}])
def test_the_size_of_a_picture_is_read_from_its_head(how):
    buffer = io.BytesIO()
    Image.new("RGB", (96, 4000)).save(buffer, "WEBP", **how)
    assert webp_size(buffer.getvalue()) == (96, 4000)


def test_a_picture_of_another_size_is_refused(root, entry):
    drawn(entry, (64, 32))
    assert list(entries.read(root).held) == [entry.name]
    drawn(entry, (10_000, 10_000))
    assert "it has 10000x10000 pixels, and entry.json says 64x32" in refused(root)


@pytest.mark.parametrize(
    "wrong", [{"images": []}, {"columns": ["original"]}, {"side": -5}, {"images": [-1]}]
)
def test_a_gallery_of_nothing_is_refused(root, entry, wrong):
    drawn(entry, (64, 32), **wrong)
    assert "entry.gallery." in refused(root)


def test_a_picture_that_may_not_be_shown_is_refused(root):
    values, table = numbers(defense="vib")
    values["data"]["dataset"] = "celeba"
    folder = layout.record_folder(root, put(root, values, table))
    drawn(folder, (64, 32))
    assert "the terms of celeba are not known to let its images" in refused(root)


def test_values_per_image_that_no_run_writes_are_refused(root):
    values, table = numbers(defense="vib")
    put(root, values, table.assign(ssim="much"))
    assert "the column 'ssim' holds no numbers" in refused(root)


def test_a_table_of_millions_is_not_read(root):
    values, table = numbers(defense="vib")
    put(root, values, pd.DataFrame({name: np.zeros(10**6) for name in table.columns[:11]}))
    assert "it has 1,000,000 rows of 11 columns, too many" in refused(root)


def test_aliases_in_an_advisory_are_not_followed(root, entry):
    layout.advisories(root).mkdir()
    nine = "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise("abcdefghij"))
    (layout.advisories(root) / "A.yaml").write_text(f"a: &a [x]\n{nine}")
    assert "aliases and deep nesting are not read" in refused(root)


@pytest.mark.parametrize("name", ["n\u043ene", "\u202egpj", "<b>", "a b", ""])
def test_a_submission_whose_name_could_pass_for_another_is_refused(root, entry, name):
    edit(entry / layout.ENTRY, origin={"kind": "submission", "submission": name})
    assert "entry.origin.submission" in refused(root)


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(BoardError, match="there is no leaderboard in"):
        entries.read(tmp_path / "v9")


# --- adding --------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    return ArtifactStore(tmp_path / "cache")


def test_a_run_is_copied_byte_for_byte(root, store):
    run = base()[0]
    origin = Origin(kind="submission", submission="doe", title="T")
    entry = entries.add(run, root, origin, {"accuracy": 0.9}, store=store)
    folder = layout.record_folder(root, entry.record)
    for name in (RECORD, PER_IMAGE):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    assert entry.level is Level.CLAIMED
    assert entry.origin == origin
    assert entry.claims == {"accuracy": 0.9}
    assert entry.gallery is None
    assert entry.gallery_reason
    checks = {line.check: line.verdict for line in entry.verifications[0].checks}
    assert checks["record-means"] == "passed"
    assert list(entries.read(root).held) == [entry.record]


def test_adding_again_changes_nothing(root, store):
    run = base()[0]
    entry = entries.add(run, root, store=store)
    path = layout.record_folder(root, entry.record) / layout.ENTRY
    before = path.read_bytes(), path.stat().st_mtime_ns
    again = entries.add(run, root, Origin(kind="submission", submission="thief"), store=store)
    assert again == entry
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


def test_a_run_that_fails_a_check_is_not_put_there(root, store, tmp_path):
    run = run_folder(tmp_path / "run")
    (run / "reconstructions" / "0003.png").unlink()
    with pytest.raises(BoardError, match="record-counts: 1 of 128 reconstructions are missing"):
        entries.add(run, root, store=store)
    assert not layout.records(root).exists()


def test_a_verification_is_added_once(root, entry):
    one = Verification(
        level=Level.REPRODUCED, date="2026-03-01", version="1", verdict="same", seed=1,
        checks=[CheckLine(check="c", verdict="passed", found="f")],
    )  # fmt: skip
    before = entries.read_entry(root, entry.name)
    found = entries.verified(root, entry.name, one)
    assert found.verifications == [*before.verifications, one]
    assert found.level is Level.REPRODUCED
    assert entries.verified(root, entry.name, one) == found
    assert entries.read(root).held[entry.name].listed.entry == found


def test_what_is_not_there_cannot_be_verified(root, entry):
    one = Verification(level=Level.RESCORED, date="2026-03-01", version="1")
    with pytest.raises(BoardError, match="there is no record 'ffffffffffffffff'"):
        entries.verified(root, "f" * 16, one)
