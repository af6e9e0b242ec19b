"""Writes the folder of a new submission."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from string import Template
from typing import Literal

from mibench.errors import StorageError, SubmissionError
from mibench.files import ensure_writable, write_atomically
from mibench.job import SUITE
from mibench.registry import attacks, defenses
from mibench.submission.schema import FILE, NAME, PLACEHOLDER, plain

PROTOCOL = "cifar10-lite-v1"
"""The protocol that a new submission names."""


def create(
    name: str,
    parent: Path,
    kind: Literal["defense", "attack"] = "defense",
    title: str | None = None,
    author: str | None = None,
) -> Path:
    """Writes a folder with a small component that works, a test and ``submission.yaml``.

    Without title or author the fields hold `PLACEHOLDER`, which `mibench submission validate`
    names; with both, the folder is whole at once.

    Args:
        name: of the submission, its folder and its component.
        parent: where the folder goes.
        kind: of the component.
        title: of the method.
        author: name of one author.

    Returns:
        The folder.

    Raises:
        SubmissionError: the name cannot be taken, or a text holds what no text may.
        StorageError: the folder is there already, or cannot be written.
    """
    wrong = []
    if not re.fullmatch(NAME, name):
        wrong.append(
            f"{name!r} cannot be a name: use 2 to 40 lower-case letters, digits and dashes, as in "
            "channel-noise"
        )
    for registry in (defenses, attacks):
        if name in registry or name == SUITE:
            wrong.append(f"{name!r} is the name of a built-in {registry.kind}; choose another")
            break
    for what, text in (("title", title), ("author", author)):
        try:
            plain(text or "")
        except ValueError as error:
            wrong.append(f"--{what} {error}")
    if wrong:
        raise SubmissionError(wrong)
    folder = parent / name
    if folder.exists():
        raise StorageError(f"{folder} is there already; choose another name")
    values = {
        "name": name,
        "folder": folder.as_posix(),
        "kind": kind,
        "class_name": _class_name(name),
        "protocol": PROTOCOL,
    }
    quoted = {
        "title": json.dumps(
            title or f"{PLACEHOLDER} what the method is called", ensure_ascii=False
        ),
        "author": json.dumps(author or f"{PLACEHOLDER} your name", ensure_ascii=False),
    }
    root = resources.files("mibench.submission") / "template"
    ensure_writable(folder)
    for source, target, texts in (
        (root / kind / FILE, FILE, quoted),
        (root / kind / f"{kind}.py.txt", f"{kind}.py", {}),
        (root / "test_component.py.txt", f"test_{name.replace('-', '_')}.py", {}),
        (root / "README.md", "README.md", {"title": title or name}),
    ):
        text = Template(source.read_text("utf-8")).substitute({**values, **texts})
        write_atomically(folder / target, text.encode())
    return folder


def _class_name(name: str) -> str:
    """The class that `mibench.registry.dashed` calls by this name, such as ``ChannelNoise``."""
    words = [word.capitalize() if word[0].isalpha() else f"_{word}" for word in name.split("-")]
    return "".join(words)
