"""Sweeps: what is started when, what is kept, and what a failure does."""

from pathlib import Path

import pytest

from mibench.params import build
from mibench.sweep import runner
from mibench.sweep.grid import Grid
from mibench.sweep.runner import State, Sweep, last_words, minutes_left, planned

SMOKE = "procedural-smoke-v1"


class Pretended:
    """Ends one run at each look, with the exit status that the test wants."""

    def __init__(self, workers, finished, broken=()):
        self.workers, self.done, self.broken = workers, finished, broken
        self.running, self.started, self.most, self.cancelled = [], [], 0, []

    @property
    def free(self):
        return self.workers - len(self.running)

    def submit(self, key, words, log):
        self.started.append(key)
        self.running.append(key)
        self.most = max(self.most, len(self.running))
        assert words[-2] == "--out"
        if key in self.broken:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("Training\nerror: no room\n")
        else:
            self.done.add(Path(words[-1]))

    def finished(self):
        key = self.running.pop(0)
        return {key: 2 if key in self.broken else 0}

    def cancel(self):
        self.cancelled += self.running
        self.running = []


@pytest.fixture
def done(monkeypatch):
    """Folders whose runs have finished."""
    folders = set()
    monkeypatch.setattr(runner, "POLL", 0.0)
    monkeypatch.setattr(runner, "is_finished", folders.__contains__)
    return folders


def runs_of(tmp_path, defenses=("none", "noise", "vib"), attacks=("decoder", "linear")):
    values = {"protocols": [SMOKE], "defenses": defenses, "attacks": attacks, "seeds": [0]}
    return planned(build(Grid, values, "grid").cells(), tmp_path)


@pytest.mark.parametrize("workers", [1, 2, 4, 10])
def test_every_run_is_made_once_and_no_more_at_a_time_than_asked(tmp_path, done, workers):
    runs = runs_of(tmp_path)
    executor = Pretended(workers, done)
    Sweep(runs, executor).carry_out(lambda _: None)
    assert sorted(executor.started) == sorted(run.cell.key for run in runs)
    assert executor.most == min(workers, len(runs))
    assert {run.state for run in runs} == {State.DONE}


def test_a_second_worker_does_not_wait_for_the_training_of_the_first(tmp_path, done):
    executor = Pretended(2, done)
    Sweep(runs_of(tmp_path), executor).carry_out(lambda _: None)
    first, second = executor.started[:2]
    assert first.endswith("none-decoder-s0")
    assert second.endswith("noise-decoder-s0")
    # With nothing else to do it starts what has to wait.
    executor = Pretended(2, done)
    done.clear()
    Sweep(runs_of(tmp_path, defenses=["none"]), executor).carry_out(lambda _: None)
    assert executor.most == 2


def test_what_is_finished_is_kept(tmp_path, done):
    runs = runs_of(tmp_path)
    done.update(run.folder for run in runs[:4])
    executor = Pretended(1, done)
    Sweep(runs, executor).carry_out(lambda _: None)
    assert executor.started == [run.cell.key for run in runs[4:]]
    assert [run.state for run in runs[:4]] == [State.KEPT] * 4


def test_a_failed_run_stops_no_other_and_says_why(tmp_path, done):
    runs = runs_of(tmp_path)
    executor = Pretended(2, done, broken={runs[1].cell.key})
    Sweep(runs, executor).carry_out(lambda _: None)
    assert [run.state for run in runs].count(State.DONE) == len(runs) - 1
    assert runs[1].state is State.FAILED
    assert runs[1].reason == "no room"


def test_an_exit_without_a_record_is_a_failure(tmp_path, done):
    runs = runs_of(tmp_path, defenses=["none"], attacks=["decoder"])
    executor = Pretended(1, set())
    Sweep(runs, executor).carry_out(lambda _: None)
    assert runs[0].state is State.FAILED


def test_an_interrupt_ends_what_runs_and_leaves_it_to_do(tmp_path, done):
    runs = runs_of(tmp_path)
    executor = Pretended(2, done)

    def stop(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sweep(runs, executor).carry_out(stop)
    assert len(executor.cancelled) == 2
    assert {run.state for run in runs} == {State.WAITING}


def test_the_estimate_follows_what_runs_took(tmp_path):
    runs = runs_of(tmp_path, defenses=["none", "noise"], attacks=["decoder"])
    whole = sum(run.estimate for run in runs)
    assert minutes_left(runs, 1) == pytest.approx(whole)
    assert minutes_left(runs, 2) == pytest.approx(whole / 2)
    runs[0].state, runs[0].seconds = State.DONE, 120 * runs[0].estimate
    assert minutes_left(runs, 1) == pytest.approx(2 * runs[1].estimate)
    runs[1].estimate = None
    assert minutes_left(runs, 1) is None


def test_last_words_of_a_log(tmp_path):
    assert last_words(tmp_path / "none.log") == ""
    (tmp_path / "a.log").write_text("one\nerror: two\n\n")
    assert last_words(tmp_path / "a.log") == "two"
