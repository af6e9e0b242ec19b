"""What a pull request changes in ``submissions/`` and ``leaderboard/``, and whether it may.

Usage: ``python .ci/changes.py CHECKOUT BASE``. Prints the folder of the submission, or nothing
where there is none. Status 1 and all problems, one a line, where something is not allowed; status 2
where git does not know ``BASE``. Needs nothing but Python's own library and git; reads names and
modes, never the content of a file.
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import PurePosixPath

FOLDER = "submissions"
BOARD = "leaderboard"
PLACES = re.compile(
    r"leaderboard/(advisories/[A-Za-z0-9._-]+\.yaml"
    r"|v[0-9]+/(best-known/[A-Za-z0-9._-]+\.json|site/([A-Za-z0-9._-]+/)*[A-Za-z0-9._-]+"
    r"|records/[0-9a-f]{16}/(record\.json|per_image\.parquet|entry\.json|gallery\.webp)))"
)
"""Where files of the leaderboard may lie."""
FIXED = ("record.json", "per_image.parquet")
"""Files of a record that never change."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What a folder may be called. A shell sees the name, so nothing in it may mean something there."""


@dataclass(frozen=True)
class Change:
    """One line of ``git diff --raw``.

    Attributes:
        status: ``A`` added, ``M`` changed, ``D`` removed, ``T`` of another type.
        mode: of the new file in octal; ``000000`` where it was removed.
        path: from the root of the repository.
    """

    status: str
    mode: str
    path: str


def changes(checkout: str, base: str) -> list[Change]:
    """Lists what the checked-out commit changes since it left ``base``.

    Args:
        checkout: folder of the repository.
        base: a revision, such as ``origin/main`` or ``HEAD^1`` of a merge.

    Raises:
        subprocess.CalledProcessError: git does not know the revision.
    """
    asked = ["git", "-C", checkout, "diff", "--raw", "-z", "--no-renames", "--no-abbrev"]
    told = subprocess.run([*asked, "--merge-base", base, "HEAD"], check=True, capture_output=True)  # noqa: S603
    # Names are bytes to git. What is not UTF-8 is shown as an escape, and is not an allowed name.
    fields = told.stdout.decode("utf-8", "backslashreplace").split("\0")
    found = []
    for heading, path in zip(fields[::2], fields[1::2], strict=False):
        _, mode, _, _, status = heading.removeprefix(":").split(" ")
        found.append(Change(status[0], mode, path))
    return found


def submission(found: list[Change], before: set[str]) -> tuple[str | None, list[str]]:
    """Judges the changes.

    Args:
        found: from `changes`.
        before: names of the folders that were in ``submissions/`` already.

    Returns:
        Name of the submission's folder, or None where no submission is touched, and the problems.
    """
    parts = [(change, PurePosixPath(change.path).parts) for change in found]
    # A file that lies directly in submissions/, such as its README, belongs to no submission.
    inside = [(c, p[1]) for c, p in parts if p[0] == FOLDER and len(p) > 2]
    names = sorted({name for _, name in inside})
    problems = [
        f"{change.path!r} is not a plain file (git mode {change.mode}): "
        "no links and no repositories inside"
        for change, path in parts
        if path[0] in (FOLDER, BOARD) and change.status != "D" and not change.mode.startswith("100")
    ]
    problems += board(found)
    if not names:
        return None, problems
    if len(names) > 1:
        problems.append(
            f"{len(names)} submissions are changed ({', '.join(map(repr, names))}): "
            "make a pull request for each"
        )
    problems += [
        f"{change.path!r} lies outside {f'{FOLDER}/{names[0]}'!r}: "
        "a pull request with a submission changes its folder and nothing else"
        for change, path in parts
        if path[0] != FOLDER or len(path) <= 2
    ]
    problems += [
        f"{name!r} is no name for a folder: use letters, digits, dots, dashes and underscores"
        for name in names
        if not NAME.fullmatch(name)
    ]
    problems += [
        f"{FOLDER}/{name} was accepted and stays as it is: "
        f"make a new folder whose submission.yaml says 'supersedes: {name}'"
        for name in names
        if name in before
    ]
    return names[0], problems


def board(found: list[Change]) -> list[str]:
    """What a change does to the leaderboard that none may do: records stay, as they were made.

    Whether a badge was earned cannot be seen here; ``mibench board diff`` names edited entries.
    """
    problems = []
    for change in found:
        path = PurePosixPath(change.path)
        if path.parts[0] != BOARD:
            continue
        removed = change.status == "D"
        if not removed and not PLACES.fullmatch(change.path):
            problems.append(f"{change.path!r} has no place in the leaderboard")
        entry = removed and path.name == "entry.json"
        if "records" in path.parts and change.status != "A" and (entry or path.name in FIXED):
            problems.append(
                f"{change.path!r} is {'removed' if removed else 'changed'}: a record stays as it "
                "is; write an advisory, or add another record that supersedes it"
            )
    return problems


def folders(checkout: str, base: str) -> set[str]:
    """Names of the folders in ``submissions/`` at the commit where the change left ``base``."""
    git = ["git", "-C", checkout]
    left = subprocess.run([*git, "merge-base", base, "HEAD"], check=True, capture_output=True)  # noqa: S603
    commit = left.stdout.decode().strip()
    listed = subprocess.run(  # noqa: S603
        [*git, "ls-tree", "-d", "-z", "--name-only", commit, f"{FOLDER}/"],
        check=True,
        capture_output=True,
    )
    names = listed.stdout.decode("utf-8", "backslashreplace").split("\0")
    return {PurePosixPath(name).name for name in names if name}


def main() -> int:
    """Prints the folder, or the problems."""
    checkout, base = sys.argv[1:3]
    try:
        name, problems = submission(changes(checkout, base), folders(checkout, base))
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"error: {' '.join(error.stderr.decode(errors='replace').split())}\n")
        return 2
    for problem in problems:
        sys.stderr.write(f"error: {problem}\n")
    if problems:
        return 1
    if name is not None:
        sys.stdout.write(f"{FOLDER}/{name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
