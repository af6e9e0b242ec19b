import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mibench import files
from mibench.errors import StorageError
from mibench.files import (
    canonical_json,
    content_id,
    ensure_writable,
    pretty_json,
    write_atomically,
)

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text("abc\u00e9", max_size=3), inner),
    max_leaves=10,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def failing(code):
    def fail(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    return fail


def test_a_new_file_is_written_and_an_old_one_replaced(tmp_path):
    path = tmp_path / "scores.json"
    write_atomically(path, b"one")
    assert path.read_bytes() == b"one"
    write_atomically(path, b"two and longer")
    assert path.read_bytes() == b"two and longer"
    write_atomically(path, b"")
    assert path.read_bytes() == b""
    assert names(tmp_path) == ["scores.json"]


def test_the_mode_of_a_new_file_follows_the_umask(tmp_path):
    path = tmp_path / "scores.json"
    old = os.umask(0o027)
    try:
        write_atomically(path, b"x")
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_name_as_long_as_the_system_allows_can_be_written(tmp_path):
    path = tmp_path / ("n" * 255)
    write_atomically(path, b"x")
    assert path.read_bytes() == b"x"


def test_a_symbolic_link_is_followed_and_stays(tmp_path):
    target = tmp_path / "real.json"
    target.write_bytes(b"old")
    link = tmp_path / "link.json"
    link.symlink_to(target)
    write_atomically(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (errno.ENOSPC, ["disk is full", "free some space", "cache are kept"]),
        (errno.EDQUOT, ["quota", "free some space"]),
        (errno.EROFS, ["read-only"]),
        (errno.EACCES, ["permission denied"]),
        (errno.EIO, ["reported an error"]),
        (errno.ETXTBSY, [os.strerror(errno.ETXTBSY)]),
    ],
)
def test_a_failing_write_says_why_and_leaves_the_old_file(tmp_path, monkeypatch, call, code, words):
    path = tmp_path / "scores.json"
    path.write_bytes(b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        with pytest.raises(StorageError) as caught:
            write_atomically(path, b"new")
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    for word in words:
        assert word in message
    assert caught.value.__cause__.errno == code
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["scores.json"]


def test_an_interrupt_leaves_the_old_file_and_passes_through(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    path.write_bytes(b"old")

    def interrupt(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["scores.json"]


def test_a_write_cut_short_by_the_system_leaves_the_old_file(tmp_path):
    # The limit on file sizes makes a real write fail half way, as a full disk does.
    (tmp_path / "out.bin").write_bytes(b"old")
    script = """
import resource, sys
from pathlib import Path
from mibench.errors import StorageError
from mibench.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(Path(sys.argv[1]), bytes(100_000))
except StorageError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out.bin")],
        cwd=Path(files.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "larger than allowed" in done.stdout
    assert (tmp_path / "out.bin").read_bytes() == b"old"
    assert names(tmp_path) == ["out.bin"]


def test_a_folder_that_cannot_be_synced_is_no_failure(tmp_path, monkeypatch):
    real = os.fsync

    def refuse_folders(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            raise OSError(errno.EINVAL, "not on this file system")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    write_atomically(tmp_path / "scores.json", b"x")
    assert (tmp_path / "scores.json").read_bytes() == b"x"


def test_paths_that_no_file_can_have(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="a part of this path is a file"):
        write_atomically(tmp_path / "file" / "scores.json", b"x")
    with pytest.raises(StorageError, match="the folder does not exist"):
        write_atomically(tmp_path / "absent" / "scores.json", b"x")
    with pytest.raises(StorageError, match="not a regular file"):
        write_atomically(tmp_path, b"x")
    with pytest.raises(StorageError, match="too long"):
        write_atomically(tmp_path / ("n" * 300), b"x")
    assert names(tmp_path) == ["file"]


def test_a_device_is_not_replaced_by_a_file(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="not a regular file"):
        write_atomically(pipe, b"x")
    assert pipe.is_fifo()


def test_ensure_writable_creates_the_folder_and_leaves_nothing_in_it(tmp_path):
    folder = tmp_path / "a" / "b"
    ensure_writable(folder)
    ensure_writable(folder)
    assert names(folder) == []


def test_ensure_writable_refuses_what_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    for folder in (tmp_path / "file", tmp_path / "file" / "inner"):
        with pytest.raises(StorageError, match="a part of this path is a file"):
            ensure_writable(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.ENOSPC))
        with pytest.raises(StorageError, match="the disk is full"):
            ensure_writable(tmp_path / "full")
    assert names(tmp_path / "full") == []


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_both_forms_of_json_read_back_as_the_value(value):
    assert json.loads(canonical_json(value)) == value
    assert json.loads(pretty_json(value)) == value
    assert content_id(value) == content_id(json.loads(pretty_json(value)))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text("abcd", max_size=3), VALUES, max_size=5), st.randoms())
def test_the_order_of_a_mapping_does_not_matter(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert canonical_json(dict(items)) == canonical_json(value)
    assert pretty_json(dict(items)) == pretty_json(value)


def test_the_canonical_bytes_are_these():
    # Ids are made of them, so a change here orphans every cache and record.
    value = {"b": [1, 1.0, 1e-5], "a": {"\u00e9": None, "t": True}}
    assert canonical_json(value) == '{"a":{"t":true,"\u00e9":null},"b":[1,1.0,1e-05]}'.encode()
    assert content_id(value) == "0dbd419d31f1968a"
    assert pretty_json({"b": 1, "a": [2]}) == b'{\n  "a": [\n    2\n  ],\n  "b": 1\n}\n'


def test_any_sequence_or_mapping_will_do():
    assert canonical_json((1, (2,))) == canonical_json([1, [2]])
    assert canonical_json(MappingProxyType({"a": (1,)})) == b'{"a":[1]}'


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(number):
    for form in (canonical_json, pretty_json, content_id):
        with pytest.raises(ValueError, match="not JSON compliant"):
            form({"a": [number]})


@pytest.mark.parametrize("value", [{1: 2}, {"a": b"x"}, {"a": {1, 2}}, {None: 1}, object()])
def test_what_is_not_json_is_refused(value):
    for form in (canonical_json, pretty_json):
        with pytest.raises(TypeError):
            form(value)


def test_the_length_of_an_id():
    assert len(content_id("x", 64)) == 64
    assert content_id("x", 64).startswith(content_id("x", 8))
    for length in (0, 65):
        with pytest.raises(ValueError, match="1 to 64"):
            content_id("x", length)


def test_importing_files_does_not_import_torch():
    script = "import sys, mibench.files; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=Path(files.__file__).parents[1], check=True)
