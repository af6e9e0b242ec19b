"""Pins of the lowest versions that ``pyproject.toml`` allows, for ``pip install --constraint``.

Usage: ``python .ci/pins.py pyproject.toml``. Needs nothing but Python 3.11's own library.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

LOWER = re.compile(r">=\s*([0-9][^,;\s]*)")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def pins(text: str) -> list[str]:
    """Gives ``name==lower`` for each requirement of a ``pyproject.toml`` that has a lower bound.

    Args:
        text: content of the file.

    Raises:
        ValueError: a requirement of the package itself has no lower bound, so that nobody knows
            which versions it was meant for. Tools of development may go without.
    """
    project = tomllib.loads(text)["project"]
    extras = project.get("optional-dependencies", {})
    found = []
    for extra, requirements in [("", project["dependencies"]), *extras.items()]:
        for requirement in requirements:
            name, lower = NAME.match(requirement), LOWER.search(requirement)
            if name and lower:
                found.append(f"{name.group()}=={lower.group(1)}")
            elif extra != "dev":
                raise ValueError(f"{requirement!r} in pyproject.toml has no lower bound")
    return found


if __name__ == "__main__":
    sys.stdout.write("\n".join(pins(Path(sys.argv[1]).read_text(encoding="utf-8"))) + "\n")
