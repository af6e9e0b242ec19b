from pathlib import Path

import pytest

from mibench.record import Record, read_record


@pytest.mark.slow
def test_show_prints_the_table_of_the_run(invoke, finished):
    shown = invoke("show", finished.out)
    assert shown.exit_code == 0
    table = shown.stdout[shown.stdout.index("Leakage of 8") :]
    assert table in finished.stdout
    assert invoke("show", finished.out / "record.json").stdout == shown.stdout


@pytest.mark.slow
def test_a_reason_is_given_once(invoke, finished, tmp_path):
    def without(scores):
        gone = {"value": None, "ci_low": None, "ci_high": None, "n": 0, "reason": "no weights"}
        return [s.model_copy(update=gone) if "ssim" in s.metric else s for s in scores]

    groups = ("scores", "undefended", "prior_only", "permuted", "leakage")
    update = {name: without(getattr(finished.record, name)) for name in groups}
    record: Record = finished.record.model_copy(update=update)
    (tmp_path / "record.json").write_bytes(record.to_json())
    text = invoke("show", tmp_path).stdout
    assert text.count("no weights") == 1
    assert "No number for ssim: no weights" in text


@pytest.mark.slow
def test_the_speed_of_the_attack_and_broken_messages_are_told(invoke, finished, tmp_path):
    assert "s per image, training not counted" in finished.stdout
    assert "no numbers" not in finished.stdout
    adversary = finished.record.adversary.model_copy(update={"broken": 3})
    record: Record = finished.record.model_copy(update={"adversary": adversary})
    (tmp_path / "record.json").write_bytes(record.to_json())
    text = invoke("show", tmp_path).stdout
    assert "3 of the attacked images came with values that are no numbers" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "error", "said"),
    [("started", None, "has not finished"), ("error", "no images", "failed: no images")],
)
def test_show_of_an_unfinished_run(invoke, finished, tmp_path, status, error, said):
    record = finished.record.model_copy(update={"status": status, "error": error})
    (tmp_path / "record.json").write_bytes(record.to_json())
    shown = invoke("show", tmp_path)
    assert shown.exit_code == 0
    assert said in shown.stdout
    assert read_record(tmp_path).status == status


def test_list_names_everything(invoke):
    text = invoke("list").stdout
    for word in (
        "defenses", "privdfs", "attacks", "diffusion", "protocols", "cifar10-lite-v1", "datasets",
        "procedural", "backbones", "small-resnet", "metrics", "lpips",
    ):  # fmt: skip
        assert word in text
    assert "paper:" not in text


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("defenses", "arXiv 2508.04346"),
        ("attacks", "knowledge: white_box"),
        ("protocols", "never ranked"),
        ("datasets", "cifar10"),
        ("backbones", "resnet18"),
        ("metrics", "version: 1"),
    ],
)
def test_list_of_one_kind_has_the_facts(invoke, kind, said):
    assert said in invoke("list", kind).stdout


def listed_cut(text, backbone, point):
    """The cells of one row of a backbone's table."""
    lines = text[text.index(f"\n{backbone} ") :].splitlines()
    return next(line for line in lines if line.split()[:1] == [point]).split()[1:]


def test_list_backbones_tells_what_each_split_point_sends_and_costs(invoke):
    text = invoke("list", "backbones").stdout
    assert "images of 32x32 pixels" in text
    stem = listed_cut(text, "small-resnet", "stem")
    flops = 2 * 27 * 64 * 16 * 16
    assert stem == ["64", "x", "16", "x", "16", "5.33", "1,856", f"{flops / 1e6:.2f}"]
    assert listed_cut(text, "vit-tiny", "block12")[:3] == ["65", "x", "192"]


def test_list_backbones_at_a_size_that_one_cannot_take(invoke):
    result = invoke("list", "backbones", "--image-size", 12)
    assert result.exit_code == 0
    assert listed_cut(result.stdout, "resnet18", "layer2")[:5] == ["128", "x", "6", "x", "6"]
    after = result.stdout[result.stdout.index("\nhe-cnn ") :].splitlines()
    assert "cannot be shown: backbone he-cnn: images of 12x12" in after[3]


@pytest.mark.parametrize("kind", [["metrics"], []])
def test_an_image_size_is_for_backbones_alone(refused, kind):
    line = refused("list", *kind, "--image-size", 64)
    assert "mibench list backbones --image-size 64" in line


def test_doctor_finds_what_is_there(invoke, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "file").write_bytes(b"x" * 2500)
    for name in ("cifar10", "holiday"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "train-00000-of-00001.parquet").touch()
    result = invoke("doctor", "--data-root", tmp_path / "data")
    assert result.exit_code == 0
    for words in (
        "cpu", "splits train", "not a dataset of this mibench", "(2.5 kB;", "HF_HUB_OFFLINE",
        "LPIPS weights", "torch 2.", "free disk",
    ):  # fmt: skip
        assert words in result.stdout
    assert not Path("runs").exists()


def test_doctor_without_a_data_folder(invoke):
    assert "no such folder" in invoke("doctor", "--data-root", "absent").stdout


@pytest.mark.slow
def test_what_the_shares_tell_has_a_table_of_its_own(invoke, finished):
    table = finished.stdout[finished.stdout.index("What the shares tell") :]
    for score in finished.record.information:
        assert score.metric in table
    assert "times the undefended client's time" in table
    assert "of activations at most" in table
