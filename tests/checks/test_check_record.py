"""Records: what an honest run leaves passes, and every edit is told by the check that should."""

import json
import shutil
from dataclasses import replace

import pandas as pd
import pytest
from forged_runs import cover_up, forge, read, reckon, score_of, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mibench.checks.base import Verdict, caught
from mibench.checks.record import check_run
from mibench.checks.record_numbers import of_parts
from mibench.checks.record_run import Run
from mibench.errors import RecordError
from mibench.record import SuitePart, read_record

RANKED = "cifar10-lite-v1"
OPEN = "procedural-smoke-v1"
"""Its images can be made anywhere, so its reconstructions are scored again."""


@pytest.fixture(scope="session")
def honest(tmp_path_factory):
    """Folders of honest runs, made once."""
    made = {}

    def make(protocol=RANKED, **changes):
        key = (protocol, *sorted(changes.items()))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("run")
            forge(made[key], protocol_id=protocol, **changes)
        return made[key]

    return make


@pytest.fixture
def run(honest, tmp_path):
    """A copy of an honest run, to spoil."""

    def make(protocol=RANKED, **changes):
        folder = tmp_path / "run"
        shutil.copytree(honest(protocol, **changes), folder)
        return folder

    return make


def told(folder, cache=None):
    return [one.found for one in check_run(folder, cache=cache) if one.verdict is Verdict.FAILED]


@pytest.mark.parametrize("protocol", [RANKED, OPEN])
def test_an_honest_run_passes(honest, tmp_path, protocol):
    findings = check_run(honest(protocol), cache=tmp_path)
    verdicts = {one.check: one.verdict for one in findings}
    assert set(verdicts.values()) <= {Verdict.PASSED, Verdict.SKIPPED}
    scored_again = verdicts["record-rescored"]
    assert scored_again is (Verdict.PASSED if protocol == OPEN else Verdict.SKIPPED)
    assert json.loads((honest(RANKED) / "record.json").read_text())["protocol"]["ranked"]


def test_a_run_with_another_seed_passes_while_it_says_so(honest, tmp_path):
    folder = honest(RANKED, seed=3)
    assert caught(check_run(folder)) == []
    assert read(folder)["protocol"]["ranked"] is False


def test_a_weak_attack_that_is_marked_is_a_warning(honest):
    findings = check_run(honest(RANKED, undefended=0.05))
    assert caught(findings) == []
    assert any(
        one.check == "record-calibration" and one.verdict is Verdict.WARNED for one in findings
    )


def test_all_problems_are_told_at_once_each_in_one_line(run):
    folder = run()
    values = read(folder)
    values["extra"] = 1
    values["cost"]["more"] = 1
    score_of(values, "scores", "psnr")["value"] += 1
    score_of(values, "permuted", "ssim")["p95"] += 0.1
    values["adversary"]["corrupted"] = [0, 1]
    write(folder, values)
    (folder / "grid.png").write_bytes(b"")
    lines = told(folder)
    for word in (
        "extra",
        "cost.more",
        "mean of scores: psnr",
        "p95 of ssim",
        "grid.png",
        "servers",
    ):
        assert any(word in line for line in lines), word
    assert all("\n" not in line for line in lines)


NUMBERS = [
    (place, metric, key)
    for place in ("scores", "undefended", "permuted", "prior_only")
    for metric in ("mse", "psnr", "ssim")
    for key in ("value", "ci_low", "ci_high", "p50", "p95", "worst")
]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(NUMBERS), factor=st.sampled_from([0.5, 0.999, 1.0001, 2.0]))
def test_no_number_can_be_edited(honest, tmp_path_factory, where, factor):
    folder = tmp_path_factory.mktemp("edited")
    shutil.copytree(honest(RANKED), folder, dirs_exist_ok=True)
    values = read(folder)
    place, metric, key = where
    score_of(values, place, metric)[key] *= factor
    write(folder, values)
    assert "record-means" in caught(check_run(folder))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 99}', '{"a": NaN}'])
def test_what_is_no_record_is_told_in_one_finding(tmp_path, text):
    (tmp_path / "record.json").write_text(text)
    findings = check_run(tmp_path)
    assert caught(findings) == ["record-schema"]
    assert len(findings) == 1


def test_an_empty_folder_and_a_run_that_did_not_finish(run, tmp_path):
    assert caught(check_run(tmp_path / "nothing")) == ["record-schema"]
    folder = run()
    values = read(folder)
    values["status"] = "started"
    write(folder, values)
    assert "did not finish" in told(folder)[0]


def test_a_field_that_is_there_twice(run):
    folder = run()
    text = (folder / "record.json").read_text()
    (folder / "record.json").write_text('{"seed": 5,' + text.lstrip()[1:])
    assert "the field 'seed' is there twice" in told(folder)


def test_a_value_that_is_not_a_number(run):
    folder = run()
    text = (folder / "record.json").read_text()
    values = read(folder)
    value = json.dumps(score_of(values, "scores", "psnr")["value"])
    (folder / "record.json").write_text(text.replace(value, "NaN"))
    assert caught(check_run(folder))[0] == "record-schema"


def test_what_is_nested_without_end(run):
    folder = run()
    text = (folder / "record.json").read_text().rstrip()[:-1]
    (folder / "record.json").write_text(text + ', "x": ' + "[" * 10**5 + "]" * 10**5 + "}")
    assert caught(check_run(folder)) == ["record-schema"]
    with pytest.raises(RecordError, match="nested too deeply"):
        read_record(folder)


def test_a_table_that_unfolds_into_too_many_rows_is_not_read(run, monkeypatch):
    folder = run()
    monkeypatch.setattr("mibench.checks.record.MOST_ROWS", 127)
    monkeypatch.setattr("pandas.read_parquet", None)
    assert "per_image.parquet is no readable table" in told(folder)


def test_what_a_record_says_cannot_steer_a_terminal(run):
    folder = run()
    values = read(folder)
    values["defense"]["name"] = "a\n\x1b[2J\ud800b"
    write(folder, values)
    (line,) = (one.found for one in check_run(folder) if "does not come with" in one.found)
    assert line.startswith("defense a [2J b")
    line.encode()


def test_an_accuracy_far_from_that_on_the_attacked_images_is_a_warning(run):
    folder = run()
    values = read(folder)
    values["utility"][0].update(value=0.99, ci_low=0.98, ci_high=1.0)
    write(folder, values)
    findings = check_run(folder)
    assert caught(findings) == []
    assert any("far from that on the attacked" in one.found for one in findings)


def test_a_folder_that_is_a_link_is_not_followed(run, tmp_path):
    folder = run()
    (folder / "reconstructions").rename(tmp_path / "elsewhere")
    (folder / "reconstructions").symlink_to(tmp_path / "elsewhere")
    assert "record-files" in caught(check_run(folder))


def test_a_link_is_not_followed(run, tmp_path):
    folder = run()
    (folder / "manifest.txt").rename(tmp_path / "elsewhere")
    (folder / "manifest.txt").symlink_to(tmp_path / "elsewhere")
    assert "record-files" in caught(check_run(folder))


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda v: v["protocol"].update(track="standard"), "record-ranked"),
        (lambda v: v["protocol"].update(content="0" * 16), "record-ranked"),
        (lambda v: v["protocol"].update(ranked=False), "record-ranked"),
        (lambda v: v["attack"]["params"].update(steps=5000), "record-ranked"),
        (lambda v: v["cost"].update(client_flops=10**9), "record-ranked"),
        (lambda v: v["data"]["identities"].update(auxiliary="0" * 16), "record-ranked"),
        (lambda v: v.update(near_copies={"auxiliary": 20}), "record-ranked"),
        (lambda v: v["adversary"].update(transmissions=2), "record-adversary"),
        (lambda v: v["adversary"].update(screening={"0": 0.5, "1": 0.2}), "record-adversary"),
        (lambda v: v.update(calibration=[]), "record-calibration"),
        (lambda v: v["calibration"][0].update(reference=10.0), "record-calibration"),
        (lambda v: v["calibration"][0].update(reached=60.0), "record-calibration"),
        (
            lambda v: v.update(convergence=[convergence(gained={"psnr": 3.0}, converged=True)]),
            "record-calibration",
        ),
        (
            lambda v: v.update(convergence=[convergence(budget={"steps": [10, 11]})]),
            "record-calibration",
        ),
        (lambda v: v["utility"][0].update(value=0.70001), "record-identities"),
        (lambda v: v["utility"][0].update(value=0.0001), "record-identities"),
        (lambda v: v["scores"][1].update(higher_is_better=False), "record-identities"),
        (lambda v: v["data"].update(image_size=64), "record-counts"),
        (lambda v: v["data"]["images"].update(attacked=10**12), "record-counts"),
        (lambda v: v["data"]["images"].update(train=5), "record-facts"),
        (lambda v: v["data"].update(left_out={"train": -5}), "record-facts"),
        (lambda v: v.update(near_copies={"train": -3}), "record-facts"),
        (lambda v: v.update(judge=None), "record-facts"),
        (lambda v: v["judge"].update(trained_on="private"), "record-facts"),
        (lambda v: v["judge"].update(accuracy=0.7501), "record-facts"),
        (lambda v: v["judge"].update(gallery=2), "record-facts"),
        (lambda v: v["cost"].update(bytes_up=1), "record-facts"),
        (lambda v: v["information"][0].update(value=1.0, ci_low=2.0, n=5), "record-facts"),
        (lambda v: v["information"][0].update(n=-5), "record-facts"),
        (lambda v: v["distribution"].pop(0), "record-facts"),
        (lambda v: v["utility"].pop(0), "record-facts"),
        (lambda v: v["backbone"].update(name="vit"), "record-ranked"),
        (lambda v: v["protocol"]["values"].update(judge=None), "record-ranked"),
        (lambda v: v["adversary"].update(corrupted=[7]), "record-adversary"),
        (lambda v: v.update(format_version=3, data=None), "record-counts"),
        (lambda v: v["data"]["images"].update(private=5), "record-counts"),
    ],
)
def test_what_contradicts_the_protocol_or_itself(run, change, check):
    folder = run()
    values = read(folder)
    change(values)
    write(folder, values)
    assert check in caught(check_run(folder))


def convergence(**changes):
    told = {"attack": "decoder", "budget": {"steps": [800, 1600]}, "gained": {"psnr": 0.1}}
    return told | {"converged": True} | changes


def test_departures_that_are_told_are_no_failure(run):
    folder = run()
    values = read(folder)
    values["attack"]["params"]["steps"] = 5000
    values["deviations"] = ["attack.steps set by hand"]
    values["protocol"]["ranked"] = False
    write(folder, values)
    assert caught(check_run(folder)) == []


def test_other_code_is_a_warning(run):
    folder = run()
    values = read(folder)
    values["defense"]["code"] = "0" * 16
    write(folder, values)
    findings = check_run(folder)
    assert caught(findings) == []
    assert [one.check for one in findings if one.verdict is Verdict.WARNED] == ["record-ranked"]


def test_nothing_that_a_record_names_is_imported(run, tmp_path):
    folder = run()
    trap = tmp_path / "trap.py"
    trap.write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    values = read(folder)
    for kind in ("defense", "attack", "backbone"):
        values[kind]["name"] = f"{trap}:Trap"
    values["protocol"]["id"] = str(tmp_path / "protocol.yaml")
    values["protocol"]["values"]["data"]["dataset"] = f"{trap}:Trap"
    for place in ("scores", "undefended", "permuted", "prior_only"):
        values[place][0]["metric"] = f"{trap}:Trap"
    values["leakage"][0]["metric"] = f"leakage({trap}:Trap)"
    write(folder, values)
    assert caught(check_run(folder, cache=tmp_path))
    assert not (tmp_path / "sprung").exists()


def test_an_image_that_is_no_image(run):
    folder = run()
    (folder / "reconstructions" / "0003.png").write_bytes(b"no image")
    cover_up(folder, read(folder))
    assert any("0003.png is no readable PNG" in line for line in told(folder))


def test_values_that_nobody_measures_are_a_warning(run):
    folder = run()
    table = pd.read_parquet(folder / "per_image.parquet")
    table["ssim"] = 0.25
    table["permuted_psnr"] = table["permuted_psnr"].round(1)
    reckon(folder, read(folder), table)
    lines = [one.found for one in check_run(folder) if one.check == "record-plausible"]
    assert any("scores: ssim is 0.25 for every image" in line for line in lines)
    assert any("permuted: psnr are rounded" in line for line in lines)


def test_the_controls_of_a_suite_are_the_worst_of_its_attacks_own(honest):
    folder = honest(RANKED)
    table, record = pd.read_parquet(folder / "per_image.parquet"), read_record(folder)
    listed = [SuitePart(attack="decoder", scores=record.scores)]
    part = Run(folder, record, table, None, None, None)
    whole = replace(part, record=record.model_copy(update={"suite": listed}))
    assert list(of_parts(whole, {"decoder": part})) == []
    inflated = replace(whole, table=table.assign(undefended_psnr=table["undefended_psnr"] + 1))
    (problem,) = of_parts(inflated, {"decoder": part})
    assert problem.text.startswith("undefended: psnr of 128 images is not the worst")
    suite = record.attack.model_copy(update={"name": "suite"})
    left_out = [*listed, SuitePart(attack="linear", reason="too strong")]
    fewer = record.model_copy(update={"suite": left_out, "attack": suite})
    told = list(of_parts(replace(part, record=fewer), {"decoder": part}))
    assert "gradient-warm" in told[0].text
    assert told[0].verdict is Verdict.FAILED
    assert told[1].text == "linear is said not to apply: too strong"
