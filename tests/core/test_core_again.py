"""A record run again and scored anew: what is the same, and where it first differs."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from small_protocol import small_protocol

from mibench import verdict as verdicts
from mibench.artifacts import ArtifactStore
from mibench.errors import (
    DataError,
    InvalidParamsError,
    MibenchError,
    PluginError,
    RecordError,
    UnknownNameError,
)
from mibench.evaluate import evaluate
from mibench.job import SUITE, Job
from mibench.metrics.fidelity import PeakSignalToNoiseRatio
from mibench.outputs import write_result
from mibench.record import CONTROLS, read_record
from mibench.reproduce import job_of, reproduce
from mibench.rescore import rescore
from mibench.verdict import compare

PLUGIN = """
from mibench.defenses.none import Undefended

class Mine(Undefended):
    name = "mine"
"""


def protocol(**changes):
    values = {
        "private": 20,
        "attacks": {
            "linear": {}, "decoder": {"steps": 20, "batch": 16, "lr": 5e-3},
            "diffusion": {
                "tuning_images": 4, "scales": [0.1], "sampler": {"steps": 2},
                "decoder": {"size": "small", "steps": 4, "batch": 8},
                "prior": {"steps": 4, "batch": 8, "channels": [16, 16, 16]},
            },
        },
        "references": {"linear": 2.0},
    }  # fmt: skip
    return small_protocol("again-v1", **values | changes)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ArtifactStore(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def made(store, tmp_path_factory):
    """Runs a job once and gives its folder, never to be written in."""
    folder, known = tmp_path_factory.mktemp("runs"), {}

    def make(defense="noise", attack="linear", plan=None, **how):
        key = json.dumps([defense, attack, plan, sorted(how.items())], default=str)
        if key not in known:
            known[key] = folder / str(len(known))
            chosen = protocol(**(plan or {}))
            job = Job(chosen, defense, attack, how.pop("params", {}), how.pop("given", {}), **how)
            write_result(evaluate(job, store, None, "cpu"), known[key])
        return known[key]

    return make


@pytest.fixture
def run(made, tmp_path):
    """A folder of one's own of a finished run."""
    return shutil.copytree(made(), tmp_path / "run")


def edited(folder, change):
    path = folder / "record.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    return read_record(folder)


def again(folder, store, out, seed=None):
    return reproduce(read_record(folder), folder, out, store, None, "cpu", seed)


def rerun_of(folder, store, tmp_path, change):
    edited(folder, change)
    return again(folder, store, tmp_path / "again")


# --- what a record says is all that a rerun needs ------------------------------------------------


@pytest.mark.parametrize(
    ("defense", "attack", "how"),
    [
        ("noise", "linear", {"params": {"snr_db": 3.0}}),
        ("noise", "decoder", {"given": {"steps": 6}, "converge": True}),
        ("privdfs", SUITE, {"given": {"decoder": {"steps": 6}}, "seed": 3,
                            "plan": {"attacks": {"linear": {}, "decoder": {"steps": 20}}}}),
        ("privdfs", "linear", {"every_coalition": True}),
    ],
)  # fmt: skip
def test_the_job_comes_back_from_its_record(made, defense, attack, how):
    folder = made(defense, attack, **how)
    record = read_record(folder)
    job = job_of(record)
    chosen = protocol(**how.get("plan", {}))
    assert job.protocol.content_id == chosen.content_id
    # In their order, which the code of a suite follows.
    assert attack != SUITE or list(job.protocol.attacks) == list(chosen.attacks)
    assert job.protocol.references == {"linear": 2.0} or attack == "decoder"
    assert job.attack_params == how.get("given", {})
    meant = Job(chosen, defense, attack, how.get("params", {}), how.get("given", {}),
                how.get("seed", 0), converge=how.get("converge", False),
                every_coalition=how.get("every_coalition", False))  # fmt: skip
    assert job.deviations() == meant.deviations()
    assert replace(job, protocol=chosen, defense_params={}) == replace(meant, defense_params={})


def test_one_of_several_coalitions_is_a_job_as_well(made):
    record = read_record(made("privdfs", "linear", every_coalition=True) / "linear@2")
    assert job_of(record).coalition == (2,)


def test_a_rerun_is_identical(made, tmp_path):
    folder = made()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    found = again(folder, ArtifactStore(tmp_path / "fresh"), tmp_path / "again")
    assert found.word == "identical"
    assert found.differences == []
    assert all(row.agrees and row.paired for row in found.rows if row.place != "utility")
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert json.loads((tmp_path / "again" / "verdict.json").read_text())["verdict"] == "identical"
    assert read_record(tmp_path / "again").status == "success"


def test_a_suite_over_every_coalition_comes_out_again(made, store, tmp_path):
    folder = made("privdfs", "linear", every_coalition=True)
    assert again(folder, store, tmp_path / "again").word == "identical"


def test_another_seed_has_other_weights_and_is_never_identical(made, store, tmp_path):
    found = again(made(), store, tmp_path / "again", seed=1)
    assert found.word in ("same", "different")
    assert not [one for one in found.differences if one.place == "trained weights"]
    assert [row.metric for row in found.rows if row.place == "scores"] == ["mse", "psnr", "ssim"]


# --- edited by hand ------------------------------------------------------------------------------


def score_of(values, place="scores", metric="psnr"):
    return next(one for one in values[place] if one["metric"] == metric)


def raise_mean(values):
    score_of(values)["value"] += 0.25


def count_more(values):
    for place in ("scores", *CONTROLS):
        score_of(values, place)["n"] = 13


@pytest.mark.parametrize(
    ("place", "said", "change"),
    [
        ("record", "scores says that psnr is", raise_mean),
        ("record", "rests on 13 images", count_more),
        ("means", "leakage, leakage(psnr): value is",
         lambda v: score_of(v, "leakage", "leakage(psnr)").update(value=0.0)),
        ("means", "scores, psnr: ci_high is", lambda v: score_of(v).update(ci_high=60.0)),
        ("means", "scores, psnr: worst is", lambda v: score_of(v).update(worst=0.5)),
        ("means", "utility, accuracy: value is",
         lambda v: score_of(v, "utility", "accuracy").update(value=0.99)),
        ("data", "the role 'auxiliary' holds other images: 0123456789abcdef",
         lambda v: v["data"]["identities"].update(auxiliary="0123456789abcdef")),
        ("data", "number of images, private is 21",
         lambda v: v["data"]["images"].update(private=21)),
        ("data", "manifest 00", lambda v: v.update(manifest="00")),
    ],
)  # fmt: skip
def test_an_edited_record_is_different_and_the_place_is_named(
    run, store, tmp_path, place, said, change
):
    found = rerun_of(run, store, tmp_path, change)
    assert found.word == "different"
    assert found.first.place == place
    assert said in found.first.text


@pytest.mark.parametrize(
    ("place", "said", "change"),
    [
        ("code", "defense noise is version 1, code 00", lambda v: v["defense"].update(code="00")),
        ("packages", "torch is 1.0", lambda v: v["provenance"]["packages"].update(torch="1.0")),
        ("machine", "threads is 7", lambda v: v["provenance"].update(threads=7)),
        ("initial weights", "ffff in the record",
         lambda v: v["defense_facts"].update(initial_weights="ffff")),
        ("trained weights", "ffff in the record",
         lambda v: v["defense_facts"].update(trained_weights="ffff")),
        ("servers", "[3] attacked in the record, [0] here",
         lambda v: v["adversary"].update(corrupted=[3])),
    ],
)  # fmt: skip
def test_what_differs_without_an_effect_is_told(run, store, tmp_path, place, said, change):
    found = rerun_of(run, store, tmp_path, change)
    assert found.word == "identical"
    assert [one.place for one in found.differences] == [place]
    assert said in found.first.text


def shift_images(run, amount, column="psnr", images=slice(None)):
    """A forger who knows the files: values per image, their mean and the hash follow."""
    import hashlib

    path = run / "per_image.parquet"
    table = pd.read_parquet(path)
    table.loc[table.index[images], column] += amount
    table.to_parquet(path, index=False)

    def follow(values):
        values["files"]["per_image.parquet"] = hashlib.sha256(path.read_bytes()).hexdigest()
        score_of(values)["value"] = float(table["psnr"].mean())

    return edited(run, follow)


def test_values_that_moved_too_far_are_different_and_the_first_image_is_named(run, store, tmp_path):
    shift_images(run, 5.0)
    found = again(run, store, tmp_path / "again")
    assert found.word == "different"
    assert found.first.place == "per image"
    assert found.first.text.startswith("psnr of image 0 is ")
    assert [(row.place, row.metric) for row in found.rows if not row.agrees] == [("scores", "psnr")]


def test_one_image_within_the_noise_floor_is_the_same_and_named(run, store, tmp_path):
    shift_images(run, 0.01, images=slice(7, 8))
    found = again(run, store, tmp_path / "again")
    assert found.word == "same"
    assert "psnr of image 7 is" in found.first.text
    assert "1 of 12 images differ" in found.first.text


def test_another_table_than_the_records_is_told(run, store, tmp_path):
    path = run / "per_image.parquet"
    table = pd.read_parquet(path)
    table["correct"] = ~table["correct"]
    table.to_parquet(path, index=False)
    found = again(run, store, tmp_path / "again")
    assert found.word == "different"
    assert found.first.text == "per_image.parquet is not the file that the record was written with"


def test_without_values_per_image_only_means_are_compared(run, store, tmp_path):
    (run / "per_image.parquet").unlink()
    found = again(run, store, tmp_path / "again")
    assert found.word == "same"
    assert not any(row.paired for row in found.rows)
    edited(run, lambda v: score_of(v).update(value=30.0, ci_low=29.0, ci_high=31.0))
    assert again(run, store, tmp_path / "more").word == "different"


def test_a_seed_without_an_effect_is_no_seed(made, store, tmp_path):
    folder = made()
    before = read_record(folder)
    after = before.model_copy(update={"seed": 1})
    table = pd.read_parquet(folder / "per_image.parquet")
    found = compare(before, table, after, table)
    assert found.word == "different"
    assert found.first.text == "those of seed 0 and 1 are equal"


def test_the_noise_floor_decides(made, monkeypatch):
    folder = made()
    record, table = read_record(folder), pd.read_parquet(folder / "per_image.parquet")
    moved = table.assign(psnr=table["psnr"] + 0.5)
    words = {}
    for floor in (0.4, 0.6):
        monkeypatch.setitem(verdicts.TOLERANCE, "psnr", floor)
        words[floor] = compare(record, table, record, moved).word
    assert words == {0.4: "different", 0.6: "same"}
    # Where the images' own changes scatter, their interval counts as well.
    sign = np.where(np.arange(len(table)) % 2, 1.0, -1.0)
    scattered = table.assign(psnr=table["psnr"] + 0.5 + 2.0 * sign)
    monkeypatch.setitem(verdicts.TOLERANCE, "psnr", 0.4)
    assert compare(record, table, record, scattered).word == "same"


# --- what cannot be run again --------------------------------------------------------------------


def old_format(values):
    values.update(format_version=1)
    values["protocol"]["values"] = {}


@pytest.mark.parametrize(
    ("error", "said", "change"),
    [
        (RecordError, "a run that did not finish", lambda v: v.update(status="error", error="x")),
        (RecordError, "weights given by hand",
         lambda v: v["deviations"].append("trained weights given by hand (0123)")),
        (RecordError, "it was edited", lambda v: v["protocol"].update(id="other-v1")),
        (RecordError, "it was edited", lambda v: v["protocol"]["values"].update(id="other-v1")),
        (RecordError, "it was edited", lambda v: v["protocol"]["values"].update(batch=9)),
        (RecordError, "it was edited", lambda v: v["protocol"].update(content="00")),
        (InvalidParamsError, "bach", lambda v: v["protocol"]["values"].update(bach=9)),
        (RecordError, "does not hold its protocol's values", old_format),
        (InvalidParamsError, "snr", lambda v: v["defense"]["params"].update(snr_db="loud")),
        (InvalidParamsError, "sn_db", lambda v: v["defense"]["params"].update(sn_db=1.0)),
        (UnknownNameError, "does not say in which file",
         lambda v: v["defense"].update(name="mine")),
        (PluginError, "there is no file", lambda v: v["defense"].update(location="./no.py:No")),
    ],
)  # fmt: skip
def test_a_record_that_cannot_be_run_again_is_refused(run, store, tmp_path, error, said, change):
    with pytest.raises(error, match=said):
        rerun_of(run, store, tmp_path, change)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(extra=1),
        lambda v: v.pop("seed"),
        lambda v: v.pop("permuted"),
        lambda v: v["scores"].pop(),
        lambda v: v["permuted"][0].update(n=3),
        lambda v: v["scores"][0].update(value="high"),
        lambda v: v.update(format_version=99),
    ],
)
def test_fields_too_many_or_too_few_are_refused(run, store, tmp_path, change):
    with pytest.raises(RecordError):
        rerun_of(run, store, tmp_path, change)


def test_a_plugin_must_be_there_and_the_same(made, store, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN)
    name = f"{file}:Mine"
    folder = tmp_path / "run"
    write_result(evaluate(Job(protocol(), name, "linear", {}, {}), store, None, "cpu"), folder)
    record = read_record(folder)
    assert (record.defense.name, record.defense.location) == ("mine", name)
    assert again(folder, store, tmp_path / "again").word == "identical"
    file.write_text(f"{PLUGIN}    version = 1\n    other = 2\n")
    with pytest.raises(PluginError, match="is not the defense of the record"):
        again(folder, store, tmp_path / "changed")
    file.unlink()
    with pytest.raises(PluginError, match="there is no file"):
        again(folder, store, tmp_path / "gone")


# --- scored anew ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("defense", "attack", "how"),
    [
        ("noise", "linear", {}),
        ("none", "linear", {}),
        ("noise", "diffusion", {}),
        ("privdfs", SUITE, {"given": {"decoder": {"steps": 6}}, "seed": 3,
                            "plan": {"attacks": {"linear": {}, "decoder": {"steps": 20}}}}),
        ("privdfs", "linear", {"every_coalition": True}),
    ],
)  # fmt: skip
def test_the_same_metrics_give_the_same_values(made, store, tmp_path, defense, attack, how):
    folder = made(defense, attack, **how)
    old = read_record(folder)
    before = (folder / "record.json").read_bytes()
    found = rescore(folder, store, None)
    new = write_result(found.result, tmp_path / "new")
    assert (folder / "record.json").read_bytes() == before
    assert new.supersedes == old.id
    assert found.computed == {"mse": 0.0, "psnr": 0.0, "ssim": 0.0}
    for place in ("scores", *CONTROLS, "leakage", "utility", "suite", "calibration"):
        assert getattr(new, place) == getattr(old, place), place
    tables = [pd.read_parquet(one / "per_image.parquet") for one in (folder, tmp_path / "new")]
    assert tables[0].equals(tables[1][list(tables[0].columns)])
    assert set(new.files) == set(old.files)


class Halved(PeakSignalToNoiseRatio):
    """Another definition under the same name."""

    version = 2

    def per_image(self, reconstructions, originals):
        return super().per_image(reconstructions, originals) / 2


@pytest.fixture
def other_psnr(monkeypatch):
    monkeypatch.setattr("mibench.scoring._LOADED", {"psnr": Halved()})
    monkeypatch.setattr(PeakSignalToNoiseRatio, "version", 2)


def test_a_new_version_is_computed_and_departs_from_the_protocol(made, store, tmp_path, other_psnr):
    folder = made()
    old, found = read_record(folder), rescore(folder, store, None)
    new = write_result(found.result, tmp_path / "new")
    for place in ("scores", *CONTROLS):
        had, has = (next(s for s in getattr(r, place) if s.metric == "psnr") for r in (old, new))
        assert has.version == 2
        assert has.value == pytest.approx(had.value / 2)
    assert found.computed["psnr"] > 1
    assert found.computed["ssim"] == 0
    assert "metric psnr is version 2, not 1" in new.deviations
    assert new.calibration[0].reached == pytest.approx(old.calibration[0].reached / 2)
    third = rescore(tmp_path / "new", store, None).result.record
    assert third.supersedes == new.id


def forget_controls(folder):
    """A run from before the images of its controls were stored."""
    for name in ("permuted", "undefended", "guesses"):
        shutil.rmtree(folder / name)

    def old(values):
        values["format_version"] = 3
        values["files"] = {
            key: value
            for key, value in values["files"].items()
            if key not in ("permuted", "undefended", "guesses")
        }

    return edited(folder, old)


def test_an_old_run_keeps_what_has_not_changed(run, store, tmp_path, other_psnr):
    old = forget_controls(run)
    found = rescore(run, store, None)
    new = write_result(found.result, tmp_path / "new")
    assert found.kept == ["mse", "ssim"]
    assert list(found.refused) == ["psnr"]
    assert "run it again" in found.refused["psnr"]
    for place in ("scores", *CONTROLS):
        had, has = getattr(old, place), getattr(new, place)
        assert [one.value for one in has] == [had[0].value, None, had[2].value]
    assert not (tmp_path / "new" / "grid.png").exists()
    assert read_record(tmp_path / "new").format_version == 4


def test_every_image_of_a_run_is_stored_as_it_was_scored(made, store):
    found = rescore(made(), store, None).result
    original = found.originals.images()
    psnr = PeakSignalToNoiseRatio()(found.reconstructions, original)
    table = pd.read_parquet(made() / "per_image.parquet")
    assert psnr.tolist() == table["psnr"].tolist()


def damaged(folder, what):
    name, _, how = what.partition(" ")
    path = folder / name
    if how == "gone":
        path.unlink()
    elif how == "all gone":
        shutil.rmtree(path)
    elif how == "grey":
        Image.new("L", (32, 32)).save(path)
    elif how == "larger":
        Image.new("RGB", (33, 32)).save(path)
    elif how == "other":
        Image.new("RGB", (32, 32)).save(path)
    elif how == "broken":
        path.write_bytes(path.read_bytes()[:40])
    elif how == "text":
        path.write_text("no picture")
    elif how == "more":
        shutil.copy(folder / "reconstructions" / "0000.png", path)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("reconstructions/0003.png gone", "lacks 1 of 12 images, from 0003.png on"),
        ("reconstructions all gone", "lacks 12 of 12 images"),
        ("permuted/0011.png gone", "lacks 1 of 12 images, from 0011.png on"),
        ("undefended/0000.png larger", "is 33x32 RGB, not 32x32 RGB"),
        ("reconstructions/0000.png grey", "is 32x32 L, not 32x32 RGB"),
        ("reconstructions/0000.png other", "not those that the record was written with"),
        ("reconstructions/0000.png broken", "is no readable PNG"),
        ("reconstructions/0000.png text", "is no readable PNG"),
        ("reconstructions/0012.png more", "holds 1 images too many, such as 0012.png"),
        ("guesses/mean-image.png gone", "lacks 1 of 2 images"),
        ("per_image.parquet gone", "has no per_image.parquet"),
        ("per_image.parquet text", "per_image.parquet cannot be read"),
    ],
)
def test_images_that_are_not_the_runs_are_refused(run, store, what, said):
    damaged(run, what)
    with pytest.raises((DataError, RecordError), match=said):
        rescore(run, store, None)


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ("there is no result yet", lambda v: v.update(status="started")),
        ("other images", lambda v: v["data"]["identities"].update(private="00")),
        ("it was edited", lambda v: v["protocol"].update(id="other")),
        ("number of images, attacked is 13", lambda v: v["data"]["images"].update(attacked=13)),
    ],
)
def test_a_record_that_does_not_fit_is_not_scored_anew(run, store, said, change):
    edited(run, change)
    with pytest.raises(MibenchError, match=said):
        rescore(run, store, None)


def test_a_suite_needs_the_folders_of_its_attacks(made, store, tmp_path):
    folder = made("privdfs", "linear", every_coalition=True)
    copy = shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(copy / "linear@1")
    with pytest.raises(RecordError, match="has no folder 'linear@1'"):
        rescore(copy, store, None)
    edited(copy, lambda v: v["suite"][0].update(attack="../run"))
    with pytest.raises(RecordError, match="has no folder"):
        rescore(copy, store, None)
