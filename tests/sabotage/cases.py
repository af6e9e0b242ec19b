"""The sabotaged components: each one file, read and never imported."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Case:
    """One sabotaged component.

    Attributes:
        kind: name of its folder, such as ``defenses``.
        path: its file.
        trick: first line of its docstring.
        caught_by: the check that must fail.
        component: name of the last class in the file; empty where there is none.
    """

    kind: str
    path: Path
    trick: str
    caught_by: str
    component: str

    def __str__(self):
        return f"{self.kind}/{self.path.stem}"


def read(path: Path) -> Case:
    """Reads a case from its source."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    trick = (ast.get_docstring(tree) or "").partition("\n")[0]
    named = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(one, ast.Name) and one.id == "CAUGHT_BY" for one in node.targets)
    ]
    assert trick, f"{path} says not what the trick is"
    assert len(named) == 1, f"{path} needs one CAUGHT_BY"
    classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
    return Case(path.parent.name, path, trick, named[0], classes[-1] if classes else "")


def cases(kind: str | None = None) -> list[Case]:
    """All cases, or those of one kind, by name."""
    return [read(path) for path in sorted(FOLDER.glob(f"{kind or '*'}/*.py"))]
