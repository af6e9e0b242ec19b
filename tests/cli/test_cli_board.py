"""``mibench board`` from the command line."""

import functools
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from forged_runs import forge

from mibench.board import layout
from mibench.cli import board


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forged") / "run"
    forge(folder)
    return folder


@pytest.fixture
def root(tmp_path):
    return tmp_path / "leaderboard" / "v1"


@pytest.fixture
def call(invoke):
    return functools.partial(invoke, "board")


def test_add_build_check_and_diff(call, run, root, tmp_path):
    added = call("add", run, "--root", root)
    assert added.exit_code == 0, added.output
    assert "claimed" in added.output
    assert "not rescored: give the images with --data-root" in added.output
    assert "no gallery: " in added.output
    built = call("build", "--root", root)
    assert built.exit_code == 0, built.output
    assert "6 files for 1 rows (0 ranked): 6 changed, 0 removed" in built.output
    assert "0 changed, 0 removed" in call("build", "--root", root).output
    checked = call("check", "--root", root)
    assert checked.exit_code == 0, checked.output
    assert checked.output.startswith("1 records, 1 rows, 0 of them ranked: all holds; ")
    empty = tmp_path / "other" / "v1"
    empty.mkdir(parents=True)
    assert "| new |" in call("diff", empty, "--root", root).output


def test_a_problem_is_one_line_and_status_2(call, refused, run, root):
    call("add", run, "--root", root)
    call("build", "--root", root)
    page = layout.site(root) / layout.INDEX
    page.write_text(page.read_text().replace("noise", "poise", 1))
    (next(layout.records(root).iterdir()) / "x.pkl").write_bytes(b"\x80")
    line = refused("board", "check", "--root", root)
    assert "x.pkl: only record.json, per_image.parquet, entry.json, gallery.webp may lie" in line
    (next(layout.records(root).iterdir()) / "x.pkl").unlink()
    line = refused("board", "check", "--root", root)
    assert "index.html is not what the records give, from line" in line


def test_of_several_runs_the_good_ones_are_added(refused, run, root, tmp_path):
    bad = shutil.copytree(run, tmp_path / "bad")
    (bad / "manifest.txt").write_text("")
    line = refused("board", "add", bad, run, tmp_path / "none", "--root", root)
    assert "record-files: manifest.txt is not the file" in line
    assert "no record at" in line
    assert len(list(layout.records(root).iterdir())) == 1


def test_without_a_board_it_says_where_it_looked(refused, root):
    assert f"there is no leaderboard in {root}" in refused("board", "check", "--root", root)


# --- serve ---------------------------------------------------------------------------------------


@pytest.fixture
def served(root):
    place = layout.site(root)
    place.mkdir(parents=True)
    (place / layout.INDEX).write_text("<p>here</p>")
    (root.parent / "secret.txt").write_text("no")
    server = board.make_server(root, 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_pages_are_served_to_this_machine_alone(served):
    host, port = served.server_address
    assert host == "127.0.0.1"
    with urllib.request.urlopen(f"http://{host}:{port}/site/") as reply:
        assert reply.read() == b"<p>here</p>"
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://{host}:{port}/../secret.txt")


def test_a_port_in_use_is_said(refused, served, root):
    port = served.server_address[1]
    line = refused("board", "serve", "--root", root, "--port", port)
    assert f"cannot listen on port {port}" in line


def test_without_pages_there_is_nothing_to_serve(refused, root):
    assert "run `mibench board build` first" in refused("board", "serve", "--root", root)


def test_the_default_folder_is_that_of_the_layout():
    assert board._ROOT == layout.DEFAULT == Path("leaderboard/v1")
