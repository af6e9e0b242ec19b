"""The workflows keep to the rules that make it safe to run a stranger's code beside them."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.glob("*.y*ml"))
USES = re.compile(r"^\s*(?:- )?uses:\s*(\S+)\s*(?:#\s*(.*))?$", re.MULTILINE)
WITH_WRITE = {"comment.yml", "leaderboard.yml"}
"""Workflows with a job whose token can write, or that can publish."""


def parsed(path):
    return yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)


def each(path):
    """Every job of a workflow, with its steps."""
    for name, job in parsed(path)["jobs"].items():
        yield name, job, job.get("steps", [])


def steps():
    return [
        pytest.param(path, step, id=f"{path.stem}-{job}-{number}")
        for path in FILES
        for job, _, some in each(path)
        for number, step in enumerate(some)
    ]


every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
every_step = pytest.mark.parametrize(("path", "step"), steps())


def test_all_workflows_are_here():
    names = {path.name for path in FILES}
    assert names == {"ci.yml", "submission.yml", "comment.yml", "leaderboard.yml"}


@every_file
def test_actions_are_pinned_by_hash_and_say_their_version(path):
    text = path.read_text(encoding="utf-8")
    found = USES.findall(text)
    assert len(found) == sum("uses" in step for _, _, some in each(path) for step in some)
    for action, version in found:
        assert re.fullmatch(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}", action), action
        assert re.fullmatch(r"v\d+\.\d+\.\d+", version), f"{action} has no comment with its version"


def test_one_action_has_one_version_in_all_workflows():
    found = {one for path in FILES for one in USES.findall(path.read_text(encoding="utf-8"))}
    names = [action.partition("@")[0] for action, _ in found]
    assert sorted(names) == sorted(set(names))


@every_file
def test_the_token_of_pull_requests_can_only_read(path):
    workflow = parsed(path)
    triggers = workflow["on"]
    assert "pull_request_target" not in triggers
    assert workflow["permissions"] in ({}, {"contents": "read"})
    granted = {
        scope
        for _, job, _ in each(path)
        for scope, access in job.get("permissions", {}).items()
        if access != "read"
    }
    assert bool(granted) == (path.name in WITH_WRITE)
    if granted:
        assert "pull_request" not in triggers
        assert granted <= {"pull-requests", "pages", "id-token"}


@every_file
def test_there_are_no_secrets(path):
    assert not re.search(r"\{\{[^}]*\bsecrets\b|secrets:", path.read_text(encoding="utf-8"))


@every_file
def test_every_job_ends_by_itself(path):
    for name, job, _ in each(path):
        assert 0 < int(job["timeout-minutes"]) <= 60, name
        assert job["runs-on"] == "ubuntu-latest"


@every_step
def test_nothing_is_written_into_a_script(path, step):
    # A branch may be called `$(curl ...)`: what comes from outside goes through the environment.
    assert "${{" not in step.get("run", "")


@every_step
def test_a_checkout_leaves_no_token_behind(path, step):
    if step.get("uses", "").startswith("actions/checkout@"):
        assert step["with"]["persist-credentials"] == "false"


@pytest.mark.parametrize("name", sorted(WITH_WRITE))
def test_a_job_with_a_token_sees_nothing_of_a_pull_request(name):
    for job_name, job, some in each(FOLDER / name):
        if not any(access != "read" for access in job.get("permissions", {}).values()):
            continue
        for step in some:
            if step.get("uses", "").startswith("actions/checkout@"):
                ref = step["with"]["ref"]
                assert ref == "${{ github.event.repository.default_branch }}", job_name
            assert not re.search(r"\b(make|pip|mibench|pytest)\b", step.get("run", "")), job_name


@every_step
def test_scripts_that_are_called_exist_and_parse(path, step):
    for name in re.findall(r"(?<![\w/])(?:trusted/)?(\.ci/[\w.]+)", step.get("run", "")):
        script = ROOT / name
        assert script.is_file()
        assert script.stat().st_mode & 0o100
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_every_script_is_called_by_a_workflow_or_another_script():
    callers = "\n".join(
        path.read_text(encoding="utf-8")
        for path in [*FILES, *(ROOT / ".ci").iterdir(), ROOT / "Makefile"]
        if path.is_file()
    )
    for script in (ROOT / ".ci").iterdir():
        if script.is_file():
            assert re.search(rf"(\.ci|\$ci)/{re.escape(script.name)}\b", callers), script.name


@every_step
def test_make_targets_exist(path, step):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (?:-C \w+ )?([\w-]+)", step.get("run", "")):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
