"""Tests of what continuous integration does. An archive of the source has no such files."""

from pathlib import Path

collect_ignore_glob = [] if (Path(__file__).parents[2] / ".ci").is_dir() else ["test_*.py"]
