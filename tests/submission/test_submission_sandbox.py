"""Submitted code that misbehaves is stopped and reported; nothing outside its folder changes."""

import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import evil
import pytest
from submission_runs import TINY

from mibench.errors import SubmissionError
from mibench.submission import sandbox

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the kernel's walls are those of Linux"
)
PLACE = "submissions/channel-noise/defense.py:Evil"
# A dry run builds the defense, and that is when it misbehaves.
WORDS = ("run", "--dry-run", "--defense", PLACE, "--attack", "linear", "--protocol", TINY)


@pytest.fixture
def attempt(tiny_submission, tmp_path):
    """Runs a bad defense; returns how that ended and the folder of the run."""

    def call(body, limits=sandbox.LIMITS, folder_bytes=sandbox.FOLDER_BYTES, **values):
        evil.write(tiny_submission, body, **values)
        out = tmp_path / "run"
        out.mkdir()
        words = [*WORDS, "--device", "cpu", "--out", str(out)]
        done = sandbox.carry_out(
            words, out, tiny_submission, limits=limits, folder_bytes=folder_bytes
        )
        return done, out

    return call


def said(done):
    with pytest.raises(SubmissionError) as caught:
        done.refuse_failure("the run")
    return caught.value.lines


def test_what_hangs_is_stopped(attempt):
    done, _ = attempt(evil.HANGS, replace(sandbox.LIMITS, seconds=12.0))
    assert said(done) == ("the run was stopped: it took more than 12 s",)


def test_what_spins_is_stopped(attempt):
    done, _ = attempt(evil.SPINS, replace(sandbox.LIMITS, cpu_seconds=7))
    assert said(done) == ("the run was stopped: it took more than 7 s of processor time",)


@pytest.mark.parametrize("body", [evil.EATS, evil.GROWS])
def test_what_eats_memory_is_stopped(attempt, body):
    done, _ = attempt(body, replace(sandbox.LIMITS, memory_bytes=2**31))
    (line,) = said(done)
    assert "memory" in line.lower()


def test_what_writes_outside_its_folder_is_named(attempt, tmp_path):
    outside = tmp_path / "outside"
    done, _ = attempt(evil.WRITES, outside=str(outside))
    lines = said(done)
    assert lines[0].startswith("the run: the submitted code tried files: to write")
    assert not outside.exists()


def test_what_hides_that_is_named_as_well(attempt, tmp_path):
    outside = tmp_path / "outside"
    done, _ = attempt(evil.HIDES, outside=str(outside))
    assert done.status == 0
    (line,) = said(done)
    assert "to write" in line
    assert "(line " in line
    assert not outside.exists()


@pytest.mark.parametrize("body", [evil.DELETES, evil.READS])
def test_files_outside_are_neither_deleted_nor_read(attempt, tmp_path, body):
    outside = tmp_path / "outside"
    outside.write_text("a secret")
    done, _ = attempt(body, outside=str(outside))
    assert outside.read_text() == "a secret"
    assert not any("a secret" in line for line in [*done.printed, *said(done)])


@pytest.mark.skipif(not Path("/etc/hosts").is_file(), reason="no /etc/hosts")
def test_settings_of_the_machine_are_not_read(attempt):
    done, _ = attempt(evil.READS, outside="/etc/hosts")
    held = Path("/etc/hosts").read_text().split()
    assert not any(held[0] in line for line in [*done.printed, *said(done)])
    assert any("PermissionError" in line for line in done.printed)


def test_what_opens_a_socket_is_named(attempt):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        done, _ = attempt(evil.CONNECTS, port=server.getsockname()[1])
        with pytest.raises(TimeoutError):
            server.accept()
    assert "the submitted code tried network: socket" in said(done)[0]


def test_what_starts_a_program_is_named(attempt):
    done, _ = attempt(evil.STARTS)
    assert "the submitted code tried process: os.system" in said(done)[0]


def test_what_prints_without_end_is_stopped(attempt):
    done, _ = attempt(evil.PRINTS, replace(sandbox.LIMITS, output_bytes=2**20))
    assert said(done) == ("the run was stopped: it printed more than 1048576 bytes",)


@pytest.mark.parametrize("body", [evil.FILLS, evil.UNNAMED])
def test_what_fills_the_disk_is_stopped(attempt, body):
    done, _ = attempt(body, folder_bytes=2**23)
    (line,) = said(done)
    assert "it left more than 8388608 bytes in its folder" in line


def test_modes_and_times_of_files_outside_stay(attempt, tmp_path):
    outside = tmp_path / "outside"
    outside.touch(0o600)
    os.utime(outside, (1, 1))
    attempt(evil.MODES, outside=str(outside))
    assert outside.stat().st_mode & 0o777 == 0o600
    assert outside.stat().st_mtime == 1


def test_a_link_that_it_leaves_is_removed_and_named(attempt, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("a secret")
    done, out = attempt(evil.LINKS, outside=str(outside))
    assert "to leave a link behind" in said(done)[-1]
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_what_ends_the_interpreter_leaves_no_result(attempt):
    done, out = attempt(evil.ENDS)
    assert done.status == 0
    assert not (out / "record.json").exists()


def test_secrets_of_the_environment_stay_outside(attempt, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "a secret")
    done, _ = attempt(evil.SHOWS)
    (line,) = said(done)
    assert "'HOME'" in line
    assert "MY_TOKEN" not in line


def test_walls_are_told_as_they_are():
    all_up = {"files": True, "network": True, "processes": True, "namespaces": True}
    assert "NOT isolated" not in sandbox.walls(all_up)
    some = sandbox.walls({"files": False, "network": True, "missing": ["memory"]})
    assert "NOT isolated here: writing outside" in some
    assert "lacks: memory" in some
    assert "kept it from nothing" in sandbox.walls({})
