"""Processes of components: what they answer, and that no misbehaviour reaches the parent."""

import os
import textwrap
import time

import pytest
import torch

from mibench.checks.base import Verdict
from mibench.checks.confine import Limits
from mibench.checks.process import ComponentError, Nursery
from mibench.errors import MibenchError

LIMITS = Limits(seconds=4.0, memory_bytes=2**29, output_bytes=2**18)


@pytest.fixture(scope="module")
def nursery():
    with Nursery() as started:
        yield started


@pytest.fixture
def run(nursery, tmp_path):
    """Loads a metric's file whose top level is the given code; returns the process."""

    def load(code, name="metric.py:Mine", limits=LIMITS):
        (tmp_path / "metric.py").write_text(
            textwrap.dedent(code)
            + textwrap.dedent("""
            from mibench.metrics.base import Metric

            class Mine(Metric):
                '''Nothing.'''

                def per_image(self, reconstructions, originals):
                    return reconstructions.flatten(1).mean(1)
            """)
        )
        child = nursery.start("metric", limits, [tmp_path])
        child.told = child.ask(
            "component.load", kind="metric", name=str(tmp_path / name), params={}
        )[0]
        return child

    return load


def caught(call, *arguments, **keywords):
    with pytest.raises(ComponentError) as error:
        call(*arguments, **keywords)
    finding = error.value.finding
    assert finding.verdict is Verdict.FAILED
    assert finding.tried
    assert finding.advice
    assert "\n" not in finding.found
    return finding


def test_a_component_is_loaded_in_its_own_process_only(run):
    child = run("import os; os.environ['SEEN'] = '1'")
    assert child.told["name"] == "mine"
    assert child.told["overrides"] == ["per_image"]
    assert "SEEN" not in os.environ
    assert child.alive
    assert not child.findings


@pytest.mark.parametrize(
    ("check", "code"),
    [
        ("limit-time", "while True: pass"),
        ("limit-time", "import time; time.sleep(1000)"),
        ("limit-output", "while True: print('x' * 1000)"),
        ("limit-memory", "kept = [bytearray(2**27) for _ in range(100)]"),
        ("limit-memory", "import torch; kept = [torch.ones(2**25) for _ in range(100)]"),
        (
            "limit-memory",
            "import mmap; m = mmap.mmap(-1, 2**31)\nfor i in range(2**19): m[i << 12] = 1",
        ),
        ("limit-exit", "import os; os._exit(0)"),
        ("limit-exit", "import sys; sys.exit(0)"),
        ("limit-exit", "import ctypes; ctypes.string_at(0)"),
        ("limit-files", "open('/tmp/mibench-must-not-be', 'w')"),
        ("limit-files", "import os; os.mkdir('/tmp/mibench-must-not-be')"),
        ("limit-network", "import socket; socket.create_connection(('127.0.0.1', 9))"),
        ("limit-process", "import subprocess; subprocess.run(['true'])"),
        ("limit-process", "import os; os.fork()"),
    ],
)
def test_a_limit_that_is_broken_is_a_finding(run, check, code):
    began = time.monotonic()
    assert caught(run, code).check == check
    assert time.monotonic() - began < 3 * LIMITS.seconds


def test_what_is_refused_and_swallowed_is_still_noted(run):
    child = run("""
    try:
        open('/tmp/mibench-must-not-be', 'w')
    except OSError:
        pass
    """)
    assert [one.check for one in child.findings] == ["limit-files"]


@pytest.mark.parametrize(
    "code",
    [
        "print('a few words')",
        "open('note.txt', 'w').write('in its own folder')",
        "import tempfile; tempfile.NamedTemporaryFile().write(b'1')",
        "import threading; t = threading.Thread(target=print); t.start(); t.join()",
        "import torch; x = torch.ones(2, requires_grad=True); x.sum().backward()",
    ],
)
def test_what_honest_code_does_is_allowed(run, code):
    child = run(code)
    assert child.alive
    assert not child.findings


def test_the_kernel_holds_where_python_cannot_see(run):
    confined = run("").confined
    if not (confined["files"] and confined["network"]):
        pytest.skip("this system has neither Landlock nor seccomp")
    code = """
    import ctypes, os
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.socket(2, 1, 0) == -1
    assert libc.fork() == -1
    assert libc.kill(os.getppid(), 0) == -1
    assert libc.open(b'/tmp/mibench-must-not-be', os.O_CREAT | os.O_WRONLY, 0o600) == -1
    assert libc.open(f'/proc/{os.getppid()}/environ'.encode(), os.O_RDONLY) == -1
    """
    assert not run(code).findings


def test_secrets_of_the_environment_stay_outside(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    run("import os; assert 'HF_TOKEN' not in os.environ")


def test_garbage_on_the_connection_is_a_finding(run):
    code = """
    import os, socket
    for number in range(3, 64):
        try:
            os.write(number, b'garbage, and more than the head of a frame')
        except OSError:
            pass
    """
    assert caught(run, code).check == "limit-reply"


def test_after_a_broken_limit_every_request_says_the_same(nursery, tmp_path):
    (tmp_path / "gone.py").write_text("import os; os._exit(3)")
    child = nursery.start("metric", LIMITS, [tmp_path])
    name = f"{tmp_path}/gone.py:Mine"
    first = caught(child.ask, "component.load", kind="metric", name=name)
    assert "status 3" in first.found
    assert caught(child.ask, "component.load", kind="metric", name="mse") == first
    assert not child.alive


def test_a_name_that_does_not_exist_is_the_users_mistake(nursery):
    child = nursery.start("metric", LIMITS)
    with pytest.raises(MibenchError, match="unknown metric 'mes'"):
        child.ask("component.load", kind="metric", name="mes")


def test_folders_are_gone_afterwards(tmp_path):
    with Nursery() as one:
        child = one.start("metric")
        assert child.folder.is_dir()
    assert not one.folder.exists()


def test_tensors_cross_unchanged():
    from mibench.checks.wire import pack, unpack

    sent = {"a": torch.randn(3, 4).T, "b": torch.arange(3), "c": torch.zeros(0)}
    frame = pack({"x": [1, None, "é"]}, sent)
    at = 0

    def read(count):
        nonlocal at
        at += count
        return frame[at - count : at]

    header, tensors = unpack(read)
    assert header == {"x": [1, None, "é"]}
    assert all(torch.equal(tensors[name], value) for name, value in sent.items())


@pytest.mark.parametrize("name", ["torch", "mibench", "json"])
def test_a_folder_in_which_the_check_is_started_gives_no_modules(name, tmp_path, monkeypatch):
    # The nursery imports these before it confines anything: a file that lies in the folder of a
    # submission must not be taken for them.
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    )
    (tmp_path / "metric.py").write_text(
        "from mibench.metrics.base import Metric\n\n\nclass Mine(Metric):\n    '''Nothing.'''\n"
        "    def per_image(self, reconstructions, originals):\n        return originals\n"
    )
    monkeypatch.chdir(tmp_path)
    with Nursery() as started:
        child = started.start("metric", LIMITS, [tmp_path])
        file = f"{tmp_path / 'metric.py'}:Mine"
        told, _ = child.ask("component.load", kind="metric", name=file, params={})
    assert told["name"] == "mine"
    assert not (tmp_path / "ran").exists()
