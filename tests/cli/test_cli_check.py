"""``mibench check``: targets, exit statuses, and what it prints."""

import json
import sys

import pytest
from typer.testing import CliRunner

from mibench.checks import targets
from mibench.checks.base import Finding, Verdict
from mibench.cli import app
from mibench.errors import MibenchError

FILE = '''
import sys
from mibench.defenses.base import Defense
from mibench.metrics.base import Metric

TRACE = sys.modules.setdefault("mibench_was_here", sys)


class Mine(Defense):
    """Plain."""

    def protect(self, images):
        return (self.client(images),)


class Other(Metric):
    """Zero."""

    def per_image(self, reconstructions, originals):
        return reconstructions.flatten(1).mean(1)


class Helper:
    """No component."""
'''


@pytest.fixture
def run(monkeypatch):
    """Runs the command with batteries that return what is given; returns result and calls."""
    calls = []

    def invoke(*words, findings=()):
        def battery(nursery, target, params, progress):
            calls.append((target.kind, target.name.rpartition("/")[2], dict(params)))
            progress("something")
            return list(findings)

        monkeypatch.setattr(targets, "run", battery)
        monkeypatch.setattr(targets, "preload", lambda kinds: [])
        calls.clear()
        return CliRunner().invoke(app, ["check", *map(str, words)]), calls

    return invoke


def finding(verdict, check="wire-logits"):
    bad = verdict in (Verdict.WARNED, Verdict.FAILED)
    return Finding(check, verdict, "tried this", "found that", "do something" if bad else "")


@pytest.mark.parametrize(
    ("verdict", "status"),
    [(Verdict.PASSED, 0), (Verdict.SKIPPED, 0), (Verdict.WARNED, 0), (Verdict.FAILED, 1)],
)
def test_only_a_failed_check_fails_the_command(run, verdict, status):
    result, calls = run("noise", findings=[finding(verdict)])
    assert result.exit_code == status
    assert calls == [("defense", "noise", {})]
    assert f"1 {verdict.value}, " in result.stdout.splitlines()[-1]
    assert ("do something" in result.stdout) is (verdict in (Verdict.WARNED, Verdict.FAILED))


def test_findings_as_json(run):
    result, _ = run("noise", "--json", findings=[finding(Verdict.FAILED)])
    told = json.loads(result.stdout)
    assert result.exit_code == 1
    assert told["findings"][0]["check"] == "wire-logits"
    assert told["findings"][0]["verdict"] == "failed"
    assert told["findings"][0]["of"] == "defense noise"


def test_parameters_are_handed_on(run):
    assert run("noise", "--set", "snr_db=6")[1] == [("defense", "noise", {"snr_db": 6})]
    assert run("noise", "--set", "defense.snr_db=6")[1][0][2] == {"snr_db": 6}


def test_a_file_is_never_imported_here(run, tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    result, calls = run(tmp_path / "mine.py")
    assert result.exit_code == 0, result.output
    assert [(kind, name) for kind, name, _ in calls] == [
        ("defense", "mine.py:Mine"),
        ("metric", "mine.py:Other"),
    ]
    assert run(f"{tmp_path}/mine.py:Other")[1][0][:2] == ("metric", "mine.py:Other")
    assert len(run(tmp_path / "mine.py", "--kind", "metric")[1]) == 1
    assert "mibench_was_here" not in sys.modules


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("nois", "did you mean 'noise'"),
        ("./absent.py", "cannot read ./absent.py"),
        ("./absent.py:Mine", "cannot read ./absent.py"),
    ],
)
def test_a_wrong_target_is_one_line_and_status_2(run, word, said):
    result, calls = run(word)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not calls


def test_a_file_without_components_and_one_that_is_not_python(run, tmp_path):
    (tmp_path / "none.py").write_text("class Helper: pass\n")
    (tmp_path / "broken.py").write_text("class Helper(: pass\n")
    for name, said in (("none.py", "holds no component"), ("broken.py", "is not Python")):
        result, _ = run(tmp_path / name)
        assert result.exit_code == 2
        assert said in result.stderr


def test_a_file_that_ends_the_interpreter_when_it_is_read_is_a_finding(run, tmp_path):
    (tmp_path / "gone.py").write_text("import os\nos._exit(0)\nclass Mine: pass\n")
    result, calls = run(tmp_path / "gone.py")
    assert result.exit_code == 1
    assert "limit-exit" in result.stdout
    assert not calls


def test_a_name_of_two_kinds_has_to_be_told_apart(monkeypatch):
    monkeypatch.setattr(targets, "KINDS", {"defense": ["both"], "attack": ["both"]})
    with pytest.raises(MibenchError, match="--kind defense"):
        targets.registered("both", None)
    assert targets.registered("both", "attack").kind == "attack"
