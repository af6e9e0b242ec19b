"""Where everything of a leaderboard lies, and how large it may be.

``root`` is the folder of one version, such as ``leaderboard/v1``.
"""

from __future__ import annotations

import re
from pathlib import Path

from mibench.outputs import PER_IMAGE, RECORD

DEFAULT = Path("leaderboard/v1")
"""The version that commands work on, seen from the top of the repository."""
ENTRY = "entry.json"
GALLERY = "gallery.webp"
FILES = (RECORD, PER_IMAGE, ENTRY, GALLERY)
"""All that may lie in the folder of a record."""
INSIDE = ("best-known", "records", "site")
"""All that may lie in the folder of a version."""
INDEX = "index.html"
BEGIN, END = "<!-- board:begin -->", "<!-- board:end -->"
"""Lines of the README between which the short table stands."""
LARGEST_FILE = 2 * 2**20
"""Bytes of the largest file of an entry."""
LARGEST_GALLERY = 256 * 2**10
LARGEST_BOARD = 10 * 2**20
"""Bytes of all versions and advisories together, pages included: they lie in git for ever."""
ID = re.compile(r"[0-9a-f]{16}")
"""What an id of a record looks like."""


def records(root: Path) -> Path:
    """The folder with one folder for each record."""
    return root / "records"


def record_folder(root: Path, record: str) -> Path:
    """The folder of one record."""
    return records(root) / record


def best_known(root: Path) -> Path:
    """The folder with the results of submitted attacks."""
    return root / "best-known"


def site(root: Path) -> Path:
    """The folder of all pages and tables."""
    return root / "site"


def advisories(root: Path) -> Path:
    """The folder of what was found wrong afterwards; all versions share it."""
    return root.resolve().parent / "advisories"


def readme(root: Path) -> Path:
    """The file with the short table, beside the folder of all versions."""
    return root.resolve().parent.parent / "README.md"
