"""Pages as files: the same bytes, nothing left over, and nothing edited by hand."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from board_runs import numbers, put, row_on, summed

from mibench.board import build, layout, rows
from mibench.errors import BoardError
from mibench.outputs import RECORD


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "leaderboard" / "v1"
    row_on(root, defense="none", ssim=1.0, found=1.0, accuracy=0.76)
    row_on(root, defense="vib", ssim=0.2, found=0.2)
    return root


def site(root):
    place = layout.site(root)
    return {p.relative_to(place).as_posix(): p.read_bytes() for p in place.rglob("*")
            if p.is_file()}  # fmt: skip


def refused(root):
    with pytest.raises(BoardError) as error:
        build.check(root)
    return str(error.value)


def test_built_twice_the_bytes_are_the_same(root):
    first = build.write(root)
    assert set(first.changed) == set(site(root)) == set(build.build(root))
    before = site(root)
    again = build.write(root)
    assert (again.changed, again.removed) == ((), ())
    assert site(root) == before


def test_what_was_built_holds(root):
    build.write(root)
    found = build.check(root)
    assert (found.records, found.rows, found.ranked) == (2, 2, 2)
    assert found.bytes == sum(p.stat().st_size for p in root.parent.rglob("*") if p.is_file())


def test_an_unbuilt_board_does_not_hold(root):
    assert f"{layout.site(root) / 'board.csv'} is missing; run `mibench board build`" in refused(
        root
    )


@pytest.mark.parametrize("name", ["board.md", "board.csv", "board.tex", "board.json", "index.html"])
def test_an_edited_page_is_found_with_its_first_difference(root, name):
    build.write(root)
    path = layout.site(root) / name
    text = path.read_text()
    path.write_text(text.replace("vib", "viper", 1))
    told = refused(root)
    assert f"{path} is not what the records give, from line " in told
    assert "vip" in told


def test_a_page_of_no_row_is_found_and_removed(root):
    build.write(root)
    path = layout.site(root) / "rows" / "old.html"
    path.write_text("old")
    assert f"{path} is the page of no row" in refused(root)
    assert build.write(root).removed == ("rows/old.html",)
    assert not path.exists()
    build.check(root)


def test_a_row_that_is_gone_takes_its_page_along(root):
    build.write(root)
    gone = next(row for s in rows.assemble(root).sections for row in s.rows if row.label == "vib")
    folder = layout.record_folder(root, gone.headline[0].id)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert f"rows/{gone.slug}.html" in build.write(root).removed


def test_a_linked_site_is_refused(root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    layout.site(root).symlink_to(elsewhere, target_is_directory=True)
    with pytest.raises(BoardError, match="is a link"):
        build.write(root)
    assert not any(elsewhere.iterdir())


def test_numbers_must_follow_from_the_values_per_image(root):
    """A record that is consistent in all its hashes, and says less than its table."""
    values, table = numbers(defense="mid", ssim=0.6)
    flattered, _ = numbers(defense="mid", ssim=0.1)
    values["scores"] = flattered["scores"]
    name = put(root, values, table)
    build.write(root)
    told = refused(root)
    assert f"{layout.record_folder(root, name)}: record-means: the mean of scores: ssim is" in told


def test_a_suite_must_be_the_worst_of_its_attacks(root):
    values, table = numbers(defense="mid", ssim=0.6)
    table["ssim"] = np.minimum(table["ssim"] - 0.2, 1.0)
    put(root, *summed(values, table))
    build.write(root)
    assert "record-suite: ssim of 128 images is not the worst" in refused(root)


def test_a_board_that_grew_too_large_is_told(root, monkeypatch):
    build.write(root)
    monkeypatch.setattr(layout, "LARGEST_BOARD", 1000)
    assert "bytes, and 1,000 are allowed" in refused(root)


def test_a_broken_record_stops_the_build(root):
    (next(layout.records(root).iterdir()) / RECORD).write_text("{}")
    with pytest.raises(BoardError, match="record"):
        build.build(root)


# --- README --------------------------------------------------------------------------------------


def test_the_table_in_the_readme_follows(root):
    readme = root.parent.parent / "README.md"
    readme.write_text(f"# A\n\n{layout.BEGIN}\nold\n{layout.END}\n\nmore\n")
    assert "README.md" in build.write(root).changed
    text = readme.read_text()
    assert text.startswith(f"# A\n\n{layout.BEGIN}\n")
    assert text.endswith(f"{layout.END}\n\nmore\n")
    assert "| vib |" in text
    assert "old" not in text
    build.check(root)
    readme.write_text(text.replace("| vib |", "| viper |"))
    assert f"{readme} is not what the records give, from line" in refused(root)


@pytest.mark.parametrize(
    "text", [layout.BEGIN, layout.END, layout.END + layout.BEGIN, 2 * (layout.BEGIN + layout.END)]
)
def test_half_of_the_marks_is_refused(root, text):
    readme = root.parent.parent / "README.md"
    readme.write_text(text)
    with pytest.raises(BoardError, match="must stand there once each"):
        build.write(root)
    assert readme.read_text() == text


def test_a_readme_without_marks_stays_as_it_is(root):
    readme = root.parent.parent / "README.md"
    readme.write_text("# A\n")
    build.write(root)
    assert readme.read_text() == "# A\n"


# --- comparing -----------------------------------------------------------------------------------


def test_new_gone_and_changed_rows_are_listed(root, tmp_path):
    old = tmp_path / "old" / "v1"
    row_on(old, defense="none", ssim=1.0, found=1.0, accuracy=0.76)
    row_on(old, defense="cem", ssim=0.5)
    lines = build.diff(root, str(old)).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    told = {line[2]: (line[0], line[3]) for line in cells}
    assert told == {"vib": ("new", "1"), "cem": ("gone", "1")}


def test_a_changed_rank_shows_both(root, tmp_path):
    old = tmp_path / "old" / "v1"
    row_on(old, defense="none", ssim=1.0, found=1.0, accuracy=0.76)
    (line,) = [one for one in build.diff(root, str(old)).splitlines() if "none" in one]
    assert [cell.strip() for cell in line.split("|")[1:5]] == [
        "changed", "cifar10-lite-v1", "none", "1 -&#62; 2",
    ]  # fmt: skip


def test_nothing_changed_is_said(root):
    assert build.diff(root, str(root)) == "No row has changed.\n"


def test_what_was_edited_beside_a_record_is_named(root, tmp_path):
    old = tmp_path / "old" / "v1"
    shutil.copytree(root, old)
    folder = min(layout.records(root).iterdir())
    values = json.loads((folder / layout.ENTRY).read_text())
    values["origin"]["authors"] = ["Somebody Else"]
    values["verifications"][0]["date"] = "2020-01-01"
    (folder / layout.ENTRY).write_text(json.dumps(values))
    assert build.diff(root, str(old)).splitlines()[-1] == (
        f"- entry of `{folder.name}`: origin, VERIFICATIONS WERE EDITED"
    )
    values = json.loads((old / "records" / folder.name / layout.ENTRY).read_text())
    values["verifications"].append(values["verifications"][0] | {"level": "reproduced"})
    (folder / layout.ENTRY).write_text(json.dumps(values))
    told = build.diff(root, str(old))
    assert "rescored -&#62; reproduced" in told
    assert told.splitlines()[-1] == f"- entry of `{folder.name}`: a further verification"


@pytest.fixture
def repository(root, tmp_path):
    def git(*words):
        settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *settings, "-C", str(tmp_path), *words], check=True,
                       capture_output=True)  # fmt: skip

    (tmp_path / "README.md").write_text("x")
    git("init", "-q")
    git("add", "README.md")
    git("commit", "-qm", "before the board")
    git("add", "leaderboard")
    git("commit", "-qm", "the board")
    return tmp_path


def test_a_revision_of_git_is_compared(root, repository):
    assert build.diff(root, "HEAD") == "No row has changed.\n"
    row_on(root, defense="cem", ssim=0.4)
    assert [line.split("|")[3].strip() for line in build.diff(root, "HEAD").splitlines()[2:]] == [
        "cem", "none",
    ]  # fmt: skip


def test_before_there_was_a_board_every_row_is_new(root, repository):
    lines = build.diff(root, "HEAD~1").splitlines()[2:]
    assert {line.split("|")[1].strip() for line in lines} == {"new"}
    assert len(lines) == 2


@pytest.mark.parametrize("other", ["no-such-branch", "--output=x", "-h"])
def test_what_is_neither_folder_nor_revision_is_refused(root, repository, other):
    with pytest.raises(BoardError, match="neither a folder nor a revision of git"):
        build.diff(root, other)


def test_json_names_the_version_of_its_form(root):
    build.write(root)
    assert json.loads((layout.site(root) / "board.json").read_text())["format_version"] == 1


def test_a_readme_of_another_encoding_is_named(root):
    layout.readme(root).write_bytes(b"\xff\xfe" + layout.BEGIN.encode())
    with pytest.raises(BoardError, match="it is not UTF-8 text"):
        build.write(root)
