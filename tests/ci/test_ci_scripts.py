"""The scripts of continuous integration, with stand-ins for the commands that they call."""

import os
import subprocess
from pathlib import Path

import pytest

CI = Path(__file__).parents[2] / ".ci"
AUTHOR = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def called(script, *words, **environment):
    return subprocess.run(
        ["bash", str(CI / script), *map(str, words)],
        capture_output=True,
        encoding="utf-8",
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
    )


@pytest.fixture
def change(tmp_path):
    """A repository whose branch ``change`` adds one submission to ``main``."""
    folder = tmp_path / "change"

    def git(*words):
        subprocess.run(["git", *AUTHOR, *words], cwd=folder, check=True, capture_output=True)

    (folder / "leaderboard/v1/records").mkdir(parents=True)
    (folder / "leaderboard/v1/records/kept").touch()
    git("init", "--quiet", "--initial-branch=main")
    git("add", "--all")
    git("commit", "--quiet", "--message=main")
    git("checkout", "--quiet", "-b", "change")
    (folder / "submissions/second").mkdir(parents=True)
    (folder / "submissions/second/submission.yaml").write_text("name: second\n")
    git("add", "--all")
    git("commit", "--quiet", "--message=change")
    return folder


def judged(change, tmp_path, mibench):
    # Beside the command lies the interpreter that reads submission.yaml.
    program(tmp_path / "bin/python", r"printf 'second/defense.py:Mine\0--kind=defense\0'")
    command = program(tmp_path / "bin/mibench", mibench)
    report = tmp_path / "report"
    result = called("submission", "main", change, MIBENCH=command, MIBENCH_REPORT=report)
    return result, (report / "report.md").read_text(encoding="utf-8")


def test_a_submission_is_validated_checked_and_compared(change, tmp_path):
    result, report = judged(change, tmp_path, f'echo "$@" >> {tmp_path}/calls; echo "| a |"')
    assert result.returncode == 0
    assert (tmp_path / "calls").read_text().splitlines() == [
        "submission validate submissions/second",
        "check second/defense.py:Mine --kind=defense",
        "board check",
        "board diff main",
    ]
    assert report.count(": passed") == 4
    assert "\n| a |\n" in report.partition("### The leaderboard")[2]


def test_a_submission_that_is_not_valid_is_not_run(change, tmp_path):
    result, report = judged(
        change,
        tmp_path,
        f'echo "$@" >> {tmp_path}/calls\n'
        '[ "$2" != validate ] || { echo "a.py:3: bad" >&2; exit 2; }',
    )
    assert result.returncode == 1
    assert "### mibench submission validate: failed\n\n    a.py:3: bad\n" in report
    assert not any(
        line.startswith("check ") for line in (tmp_path / "calls").read_text().splitlines()
    )


@pytest.mark.parametrize("step", ["check second", "board check", "board diff"])
def test_every_step_that_fails_is_told(change, tmp_path, step):
    result, _ = judged(change, tmp_path, f'case "$*" in "{step}"*) exit 1;; esac')
    assert result.returncode == 1


def test_what_is_printed_stays_in_its_block(change, tmp_path):
    printed = r"printf '# title\r# hidden\n```\n\n<b>\x1b[31m</b>\n'"
    _, report = judged(change, tmp_path, f'[ "$1" = board ] || {printed}')
    block = report.partition("### mibench check: passed\n\n")[2].partition("\n### ")[0]
    assert all(line.startswith("    ") for line in block.splitlines() if line)
    assert "\r" not in report
    assert "\x1b" not in report


def test_nothing_is_run_where_a_change_is_refused(change, tmp_path):
    (change / "mibench.py").write_text("")
    subprocess.run(["git", *AUTHOR, "add", "--all"], cwd=change, check=True)
    subprocess.run(["git", *AUTHOR, "commit", "-qm", "more"], cwd=change, check=True)
    result, report = judged(change, tmp_path, f"touch {tmp_path}/ran")
    assert result.returncode == 1
    assert "'mibench.py' lies outside 'submissions/second'" in report
    assert not (tmp_path / "ran").exists()


def commented(tmp_path, number, head="abc", report="fine"):
    """Runs the script beside a stand-in for gh that knows pull request 7 at commit abc."""
    folder = tmp_path / "report"
    folder.mkdir()
    if number is not None:
        (folder / "number").write_text(number)
    (folder / "report.md").write_text(report)
    program(
        tmp_path / "bin/gh",
        f"""echo "$@" >> {tmp_path}/calls
case "$1 $2" in
  "api repos/me/it/pulls/7") echo abc ;;
  "pr comment") [ "$3 $4" = "7 --body-file" ] && cat "$5" > {tmp_path}/posted ;;
  *) exit 1 ;;
esac""",
    )
    result = called(
        "comment",
        REPORT=folder,
        HEAD=head,
        LINK="https://example.org/1",
        GH_REPO="me/it",
        GH_TOKEN="none",
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    posted = tmp_path / "posted"
    return result, posted.read_text() if posted.exists() else None


def test_a_report_is_posted_as_plain_text(tmp_path):
    result, posted = commented(tmp_path, "7\n", report="```\n@everyone")
    assert result.returncode == 0, result.stderr
    assert "````text\n```\n@everyone\n````" in posted
    assert "https://example.org/1" in posted


@pytest.mark.parametrize(
    "number", [None, "", "8", "7 --repo other/it", "../1", "-7", "07", "7\n8", "9" * 12, "$(id)"]
)
def test_a_report_that_names_another_request_is_not_posted(tmp_path, number):
    result, posted = commented(tmp_path, number)
    assert result.returncode != 0
    assert posted is None


def test_a_request_that_has_moved_on_gets_no_comment(tmp_path):
    result, posted = commented(tmp_path, "7", head="another")
    assert result.returncode == 1
    assert "not at the commit" in result.stderr
    assert posted is None


def test_a_number_that_is_a_link_is_refused(tmp_path):
    (tmp_path / "secret").write_text("7")
    (tmp_path / "report").mkdir()
    (tmp_path / "report/number").symlink_to(tmp_path / "secret")
    result = called("comment", REPORT=tmp_path / "report", HEAD="abc", LINK="", GH_REPO="me/it")
    assert result.returncode == 1
    assert "names no pull request" in result.stderr
