import signal
import subprocess
import sys
import time

import pytest
from cli_words import PAIR

from mibench import __version__
from mibench.record import read_record

COMMAND = [sys.executable, "-m", "mibench.cli"]
LIGHT = [("--help",), ("run", "--help"), ("list",), ("list", "attacks"), ("--version",)]
PROBE = """
import sys
from mibench.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "pandas", "datasets", "numpy", "PIL", "diffusers"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("words", LIGHT, ids=" ".join)
def test_nothing_heavy_is_imported(words):
    done = subprocess.run([sys.executable, "-c", PROBE, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wrong_name_is_refused_before_torch_is_imported():
    code = PROBE.replace("assert not end.code, end.code", "assert end.code == 2, end.code")
    words = ["run", "--defense", "privdf", "--attack", "diffusion"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "did you mean 'privdfs'" in done.stderr


def test_version(invoke):
    assert invoke("--version").stdout.strip() == f"mibench {__version__}"


@pytest.mark.parametrize("words", [("run",), ("nothing",), ("list", "nothing"), ("run", "--x")])
def test_a_wrong_option_exits_with_2(invoke, words):
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_a_bug_of_ours_keeps_its_plain_traceback(tmp_path):
    code = (
        "import mibench.evaluate\n"
        "def bug(*_): raise ZeroDivisionError('a bug')\n"
        "mibench.evaluate.evaluate = bug\n"
        "from mibench.cli import main\n"
        "main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *PAIR, "--out", "out"],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback (most recent call last)")
    assert done.stderr.rstrip().endswith("ZeroDivisionError: a bug")
    record = read_record(tmp_path / "out")
    assert (record.status, record.error) == ("error", "ZeroDivisionError: a bug")


def test_ctrl_c_says_that_nothing_trained_is_lost(invoke, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("mibench.evaluate.evaluate", interrupted)
    result = invoke(*PAIR, "--out", tmp_path / "out")
    assert result.exit_code == 130
    assert result.stderr.splitlines() == [
        "interrupted: the parts trained so far are kept; the same command goes on"
    ]
    assert read_record(tmp_path / "out").status == "started"


@pytest.mark.slow
def test_a_killed_run_leaves_nothing_broken_and_goes_on(invoke, finished, tmp_path):
    out, cache = tmp_path / "out", tmp_path / "cache"
    running = subprocess.Popen([*COMMAND, *PAIR, "--out", str(out)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while all(one.parent.suffix for one in cache.glob("defense/*/artifact.json")):
            assert running.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert read_record(out).status == "started"

    again = invoke(*PAIR, "--out", out)
    assert again.exit_code == 0, again.output
    assert "reused the trained defense privdfs" in again.stdout
    record = read_record(out)
    assert record.status == "success"
    assert record.scores == finished.record.scores
    assert record.files == finished.record.files
    assert not list(out.rglob("*.tmp"))
