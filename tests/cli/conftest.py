import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from cli_words import PAIR
from typer.testing import CliRunner

import mibench.evaluate
from mibench.cli import app
from mibench.record import Record, read_record


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """Every test has its own folder and cache, and no data root."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MIBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MIBENCH_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # For child processes, where mibench is not installed but run from its checkout.
    root = str(Path(mibench.__file__).parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def invoke():
    def call(*words, **kwargs):
        return CliRunner().invoke(app, [str(word) for word in words], **kwargs)

    return call


@pytest.fixture
def refused(invoke):
    """Calls a command that must fail in one line, and returns that line."""

    def call(*words, **kwargs):
        result = invoke(*words, **kwargs)
        lines = result.stderr.strip().splitlines()
        assert result.exit_code == 2, result.output
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return call


@dataclass
class Finished:
    out: Path
    cache: Path
    stdout: str
    record: Record
    result: mibench.evaluate.Result


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """One real run of the whole way, on the protocol for tests."""
    folder = tmp_path_factory.mktemp("finished")
    kept = []
    with pytest.MonkeyPatch.context() as patch:
        real = mibench.evaluate.evaluate
        patch.setenv("MIBENCH_CACHE", str(folder / "cache"))
        patch.setattr(
            "mibench.evaluate.evaluate", lambda *args: kept.append(real(*args)) or kept[-1]
        )
        done = CliRunner().invoke(app, [*PAIR, "--out", str(folder / "out")])
    assert done.exit_code == 0, done.output
    record = read_record(folder / "out")
    return Finished(folder / "out", folder / "cache", done.stdout, record, kept[-1])
