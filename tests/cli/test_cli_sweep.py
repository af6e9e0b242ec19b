"""``mibench sweep`` as a user calls it."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from cli_words import TINY

from mibench.record import read_record
from mibench.sweep.runner import Sweep, alone_in


def write_grid(folder, **changes):
    values = {"protocols": [str(TINY)], "defenses": ["none", "noise"], "attacks": ["decoder"]}
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def test_a_dry_run_shows_every_run_and_makes_none(invoke, tmp_path):
    result = invoke("sweep", write_grid(tmp_path), "--out", "out", "--dry-run")
    assert result.exit_code == 0, result.output
    for name in ("none-decoder-s0", "noise-decoder-s0"):
        assert name in result.stdout
    assert not (tmp_path / "out").exists()


def test_wrong_names_are_refused_before_anything_runs(refused, tmp_path):
    said = refused("sweep", write_grid(tmp_path, defenses=["nonee", "nois"]), "--out", "out")
    assert "nonee" in said
    assert "nois" in said
    assert not (tmp_path / "out").exists()


def test_a_missing_grid_is_one_line(refused):
    assert "nowhere.yaml" in refused("sweep", "nowhere.yaml")


def test_a_second_sweep_in_the_same_folder_is_refused(refused, invoke, tmp_path, monkeypatch):
    grid = write_grid(tmp_path)
    with alone_in(tmp_path / "out"):
        said = refused("sweep", grid, "--out", "out", "--device", "cpu")
    assert "another sweep writes into out" in said
    assert "--workers" in said
    assert not (tmp_path / "out" / "logs").exists()
    # With the first one gone it begins; what it would run is cut short.
    monkeypatch.setattr(Sweep, "carry_out", lambda self, show: None)
    again = invoke("sweep", grid, "--out", "out", "--device", "cpu")
    assert again.exit_code == 0, again.output


@pytest.mark.slow
def test_a_sweep_is_made_then_kept_and_one_failure_stops_no_other(invoke, tmp_path):
    # A penalty so large that the training diverges.
    bad = {"name": "nopeek", "set": {"strength": 1e30}}
    grid = write_grid(tmp_path, defenses=["none", bad, "noise"])
    result = invoke("sweep", grid, "--out", "out", "--workers", "2", "--device", "cpu")
    assert result.exit_code == 1, result.output
    assert "2 of 3 runs are done" in result.stdout
    failed = [line for line in result.stdout.splitlines() if line.endswith(".log)")]
    assert len(failed) == 1
    assert "nopeek" in failed[0]
    for name in ("none", "noise"):
        assert read_record(tmp_path / f"out/tiny-test/{name}-decoder-s0").status == "success"
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("out/tiny-test/no*e*/record.json")}
    again = invoke("sweep", write_grid(tmp_path), "--out", "out", "--device", "cpu")
    assert again.exit_code == 0, again.output
    assert again.stdout.count("kept: ") == 2
    after = {p: p.stat().st_mtime_ns for p in before}
    assert after == before


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(invoke, tmp_path):
    grid = write_grid(tmp_path, defenses=["none"])
    words = ["sweep", str(grid), "--out", "out", "--device", "cpu"]
    # Whoever runs these tests in the background has them ignore Ctrl-C, and children inherit that.
    process = subprocess.Popen(
        [sys.executable, "-m", "mibench.cli", *words],
        cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    record = tmp_path / "out/tiny-test/none-decoder-s0/record.json"
    deadline = time.monotonic() + 120
    while not record.exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    # Nothing of it runs on.
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(grid) not in running.stdout
    assert f"--out out{os.sep}tiny-test" not in running.stdout
    assert invoke(*words).exit_code == 0
    assert read_record(record).status == "success"
