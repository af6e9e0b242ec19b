"""What a pull request with a submission may change, tried on repositories made for the test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / ".ci" / "changes.py"
AUTHOR = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")


class Repository:
    """A repository with one accepted submission on main, and a branch for the change."""

    def __init__(self, folder):
        self.folder = folder
        self.git("init", "--quiet", "--initial-branch=main")
        self.write("README.md", "the project")
        self.write("submissions/README.md", "how to submit")
        self.write("submissions/first/submission.yaml", "title: first")
        self.commit()
        self.git("checkout", "--quiet", "-b", "change")

    def git(self, *words):
        subprocess.run(["git", *AUTHOR, *words], cwd=self.folder, check=True, capture_output=True)

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def commit(self):
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message=a change")

    def judged(self, base="main"):
        return subprocess.run(
            [sys.executable, str(SCRIPT), str(self.folder), base],
            capture_output=True,
            encoding="utf-8",
            check=False,
        )


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def refused(result):
    """The problems of a change that must be refused, each on one line."""
    assert result.returncode == 1
    assert not result.stdout
    lines = result.stderr.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines)
    return lines


def test_a_new_folder_is_the_submission(repository):
    repository.write("submissions/second/submission.yaml", "title: second")
    repository.write("submissions/second/run/record.json", "{}")
    repository.commit()
    result = repository.judged()
    assert (result.returncode, result.stdout) == (0, "submissions/second\n")


@pytest.mark.parametrize("name", ["README.md", "docs/page.md", "submissions/README.md"])
def test_a_change_of_no_submission_is_left_alone(repository, name):
    repository.write(name, "changed")
    repository.commit()
    result = repository.judged()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_what_main_gained_meanwhile_is_not_part_of_the_change(repository):
    repository.write("submissions/second/submission.yaml", "title: second")
    repository.commit()
    repository.git("checkout", "--quiet", "main")
    repository.write("mibench/other.py", "")
    repository.write("submissions/third/submission.yaml", "title: third")
    repository.commit()
    repository.git("checkout", "--quiet", "change")
    assert repository.judged().stdout == "submissions/second\n"
    # As a pull request is checked out: the merge, against its first parent.
    repository.git("checkout", "--quiet", "main")
    repository.git("merge", "--quiet", "--no-ff", "--message=merge", "change")
    assert repository.judged("HEAD^1").stdout == "submissions/second\n"


@pytest.mark.parametrize(
    "name",
    ["mibench/metrics/ssim.py", ".ci/changes.py", "submissions/README.md", "leaderboard/v1/site/x"],
)
def test_a_submission_changes_nothing_outside_its_folder(repository, name):
    repository.write("submissions/second/submission.yaml", "title: second")
    repository.write(name, "changed")
    repository.commit()
    (problem,) = refused(repository.judged())
    assert repr(name) in problem
    assert "outside 'submissions/second'" in problem


def test_a_submission_may_not_remove_or_move_a_file_of_the_project(repository):
    repository.git("mv", "README.md", "submissions/moved.md")
    repository.write("submissions/second/submission.yaml", "title: second")
    repository.commit()
    problems = refused(repository.judged())
    assert [("'README.md'" in p or "'submissions/moved.md'" in p) for p in problems] == [True, True]


def test_two_submissions_need_two_requests(repository):
    repository.write("submissions/second/submission.yaml", "title: second")
    repository.write("submissions/third/submission.yaml", "title: third")
    repository.commit()
    problems = refused(repository.judged())
    assert any("2 submissions are changed ('second', 'third')" in problem for problem in problems)


@pytest.mark.parametrize("how", ["changed", "added to", "removed"])
def test_an_accepted_submission_stays_as_it_is(repository, how):
    if how == "changed":
        repository.write("submissions/first/submission.yaml", "title: better")
    elif how == "added to":
        repository.write("submissions/first/more.md", "more")
    else:
        repository.git("rm", "--quiet", "-r", "submissions/first")
    repository.commit()
    (problem,) = refused(repository.judged())
    assert "submissions/first was accepted" in problem
    assert "supersedes: first" in problem


def test_links_are_refused(repository):
    repository.write("submissions/second/submission.yaml", "title: second")
    (repository.folder / "submissions/second/weights.safetensors").symlink_to("/etc/hostname")
    repository.commit()
    (problem,) = refused(repository.judged())
    assert (
        "'submissions/second/weights.safetensors' is not a plain file (git mode 120000)" in problem
    )


def test_a_link_in_the_place_of_a_folder_is_refused(repository):
    # Then the link itself lies directly in submissions/, and would be taken for a page like README.
    (repository.folder / "submissions/second").symlink_to("first", target_is_directory=True)
    repository.commit()
    (problem,) = refused(repository.judged())
    assert "'submissions/second' is not a plain file (git mode 120000)" in problem


def test_repositories_inside_are_refused(repository):
    inner = repository.folder / "submissions/second/code"
    inner.mkdir(parents=True)
    Repository(inner)
    repository.commit()
    (problem,) = refused(repository.judged())
    assert "'submissions/second/code' is not a plain file (git mode 160000)" in problem


@pytest.mark.skipif(os.name != "posix", reason="names of files are bytes on POSIX only")
def test_names_are_shown_and_never_run(repository):
    repository.write("submissions/second/submission.yaml", "title: second")
    repository.write("line\nbreak\x1b[31m.txt", "")
    (repository.folder / os.fsdecode(b"latin-\xe9.txt")).write_text("")
    repository.commit()
    problems = refused(repository.judged())
    assert len(problems) == 2
    assert not any("\x1b" in problem for problem in problems)


@pytest.mark.parametrize("name", ["-rf", "$(id)", "a b", "two\nlines", "<b>", "..."])
def test_a_folder_whose_name_means_something_to_a_shell_is_refused(repository, name):
    repository.write(f"submissions/{name}/submission.yaml", "title: second")
    repository.commit()
    (problem,) = refused(repository.judged())
    assert f"{name!r} is no name for a folder" in problem


def test_an_unknown_base_fails(repository):
    result = repository.judged("no-such-branch")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "no-such-branch" in result.stderr


RECORD = "leaderboard/v1/records/0123456789abcdef"


@pytest.fixture
def board(repository):
    """A repository whose main holds a record."""
    repository.git("checkout", "--quiet", "main")
    for name in ("record.json", "per_image.parquet", "entry.json"):
        repository.write(f"{RECORD}/{name}", name)
    repository.commit()
    repository.git("checkout", "--quiet", "-b", "records")
    return repository


def test_records_are_added_and_entries_grow(board):
    for name in (
        "records/00000000000000aa/record.json",
        "records/0123456789abcdef/entry.json",
        "site/rows/a-b.html",
        "best-known/better.json",
    ):
        board.write(f"leaderboard/v1/{name}", "new")
    board.write("leaderboard/advisories/2026-001.yaml", "id: 2026-001")
    board.commit()
    assert (board.judged().returncode, board.judged().stderr) == (0, "")


@pytest.mark.parametrize("name", ["record.json", "per_image.parquet"])
def test_a_record_is_never_changed(board, name):
    board.write(f"{RECORD}/{name}", "edited")
    board.commit()
    (problem,) = refused(board.judged())
    assert "is changed: a record stays as it is" in problem


def test_nobodys_record_is_taken_away(board):
    board.git("rm", "--quiet", "-r", RECORD)
    board.commit()
    assert sum("is removed: a record stays" in line for line in refused(board.judged())) == 3


@pytest.mark.parametrize(
    "name",
    [
        "x.pkl",
        "v1/x.pkl",
        "v1/records/0123456789abcdef/x.pkl",
        "v9$(id)/site/a",
        "v1/site/<b>.html",
    ],
)
def test_what_has_no_place_in_the_leaderboard_is_refused(board, name):
    board.write(f"leaderboard/{name}", "x")
    board.commit()
    (problem,) = refused(board.judged())
    assert "has no place in the leaderboard" in problem


def test_a_link_in_the_leaderboard_is_refused(board):
    (board.folder / "leaderboard/v1/site").mkdir()
    (board.folder / "leaderboard/v1/site/index.html").symlink_to("/etc/passwd")
    board.commit()
    (problem,) = refused(board.judged())
    assert "is not a plain file" in problem
