"""Files are named by what they hold."""

import os

import pytest

from mibench.data import content
from mibench.data.content import content_key


@pytest.fixture
def files(tmp_path):
    found = [tmp_path / "a" / "x", tmp_path / "b" / "x"]
    for number, file in enumerate(found):
        file.parent.mkdir()
        file.write_bytes(bytes([number]) * 5000)
    return found


def key(files, root=None):
    return content_key(files, root, "things")


def test_names_content_and_order_count_and_times_do_not(files, tmp_path):
    before = key(files, tmp_path)
    assert len(before) == 64
    os.utime(files[0], (1, 1))
    assert key(files, tmp_path) == before
    assert key(files[::-1], tmp_path) != before
    assert key(files) != before  # as the folders are no part of the names
    files[1].write_bytes(b"\1" * 4999 + b"\2")
    assert key(files, tmp_path) != before


def test_a_change_with_the_old_size_and_time_is_seen(files):
    os.utime(files[0], (1, 1))
    before = key(files)
    files[0].write_bytes(b"\7" * 5000)
    os.utime(files[0], (1, 1))
    assert key(files) != before


def test_of_large_files_the_ends_and_the_time_count(files, monkeypatch):
    monkeypatch.setattr(content, "WHOLE", 3000)
    monkeypatch.setattr(content, "EDGE", 1000)
    keys = []
    for at, time in ((None, 1), (0, 1), (999, 1), (4000, 1), (4999, 1), (None, 2)):
        data = bytearray(5000)
        if at is not None:
            data[at] = 1
        files[0].write_bytes(data)
        os.utime(files[0], (time, time))
        keys.append(key(files))
    assert len(set(keys)) == len(keys)


def test_what_cannot_be_read_has_a_key_of_its_own(files):
    before = key(files)
    files[0].unlink()
    gone = key(files)
    files[0].write_bytes(b"unreadable")
    assert len({before, gone, key(files)}) == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes here")
def test_a_pipe_is_not_waited_for(files):
    files[0].unlink()
    os.mkfifo(files[0])
    assert len(key(files)) == 64


def test_unchanged_files_are_hashed_once(files, monkeypatch):
    before = key(files)
    monkeypatch.setattr(content, "_hash", None)
    assert key(files) == before


def test_many_files_keep_their_order(tmp_path, monkeypatch):
    files = [tmp_path / str(number) for number in range(30)]
    for number, file in enumerate(files):
        file.write_bytes(b"%d" % number)
    before = key(files)
    monkeypatch.setattr(content, "_BATCH", 7)
    monkeypatch.setattr(content, "_known", {})
    assert key(files) == before
