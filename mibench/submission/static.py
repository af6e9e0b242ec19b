"""Level 0: all that is wrong with a folder, told without running anything in it."""

from __future__ import annotations

import ast
import hashlib
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mibench.errors import SubmissionError
from mibench.files import Json
from mibench.job import SUITE
from mibench.params import attempt
from mibench.protocol import released
from mibench.registry import Registry, attacks, dashed, defenses
from mibench.submission.contents import foreign, safetensors_problems, text_problems
from mibench.submission.marked import Marked, Place, read_marked
from mibench.submission.schema import FILE, NAME, PLACEHOLDER, RANGES, Submission
from mibench.suggest import hint, unknown

ENDINGS = (".py", ".yaml", ".md", ".txt", ".safetensors")
"""Endings that a file may have; a file called LICENSE may have none."""
MAX_FILES = 24
MAX_TEXT = 256 * 1024
"""Bytes of a file of code or text."""
MAX_WEIGHTS = 1024 * 1024
"""Bytes of a file of tensors."""
MAX_FOLDER = 1536 * 1024
"""Bytes of all files together: the repository has to stay small."""
MOST = 20
"""Problems of one file that are told."""
LEFT_BY_TOOLS = ("__pycache__", ".pytest_cache", ".ruff_cache", ".mypy_cache")
"""Folders that tools leave behind; they may lie there as long as git does not hold them."""
UNSAFE = ("pickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib")
"""Modules that run code when they load data."""
UNSAFE_CALLS = ("torch.load", "torch.jit.load", "torch.hub.load", "numpy.load", "np.load")
COMPONENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\.py:[A-Za-z_][A-Za-z0-9_]*")
REGISTRIES: dict[str, Registry[Any]] = {"defense": defenses, "attack": attacks}


@dataclass(frozen=True, order=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: where, as the user would name it.
        line: which; 0 where it is the file as a whole.
        text: what is wrong and what to do.
    """

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}" if self.line else self.file
        return f"{where}: {_one_line(self.text)}"


@dataclass
class _Look:
    """A folder while it is looked at."""

    folder: Path
    marked: Marked = field(default_factory=Marked)
    found: list[Problem] = field(default_factory=list)

    def file(self, name: str, line: int, text: str) -> None:
        self.found.append(Problem(_printable(f"{self.folder}/{name}"), line, text))

    def said(self, place: Place, text: str) -> None:
        """Something is wrong with a value of ``submission.yaml``."""
        self.file(FILE, self.marked.line(place), text)


def problems(folder: Path) -> list[Problem]:
    """Returns everything that is wrong with a submission's folder; nothing of it is run.

    Sorted by file and line. Empty where nothing is wrong.
    """
    return _looked(folder)[1]


def load(folder: Path) -> Submission:
    """Reads a submission.

    Raises:
        SubmissionError: something is wrong with the folder; it holds all of it.
    """
    submission, found = _looked(folder)
    if found or submission is None:
        raise SubmissionError([str(one) for one in found])
    return submission


def _looked(folder: Path) -> tuple[Submission | None, list[Problem]]:
    look = _Look(folder)
    if folder.is_symlink() or not folder.is_dir():
        words = "is no folder of a submission; make one with `mibench submission new NAME`"
        return None, [Problem(_printable(str(folder)), 0, words)]
    contents = _files(look)
    submission = None
    if FILE in contents:
        submission = _described(look, contents[FILE], contents)
    elif not (folder / FILE).exists():
        look.file(FILE, 0, "is missing; `mibench submission new NAME` writes one")
    return submission, sorted(set(look.found))


# --- files ---------------------------------------------------------------------------------------


def _files(look: _Look) -> dict[str, bytes]:
    """Looks at every file; returns the content of those that can be read and are small enough."""
    contents: dict[str, bytes] = {}
    total = count = 0
    for path in sorted(look.folder.iterdir()):
        name = path.name
        if path.is_symlink():
            look.file(name, 0, f"is a link to {str(path.readlink())!r}; put the file itself here")
        elif path.is_dir():
            if name not in LEFT_BY_TOOLS or _is_tracked(path):
                look.file(name, 0, "is a folder; all files lie in the submission's folder itself")
        elif not path.is_file():
            look.file(name, 0, "is no plain file; take it away")
        else:
            size = path.stat().st_size
            total, count = total + size, count + 1
            data = _content(look, path, size)
            if data is not None:
                contents[name] = data
    if total > MAX_FOLDER:
        look.file("", 0, f"holds {total:,} bytes, above the limit of {MAX_FOLDER:,}")
    if count > MAX_FILES:
        look.file("", 0, f"holds {count} files, above the limit of {MAX_FILES}")
    return contents


def _is_tracked(path: Path) -> bool:
    """Whether git holds what a tool has left behind; without git, nobody would receive it."""
    git = shutil.which("git")
    if git is None:
        return False
    words = [git, "-C", str(path.parent), "check-ignore", "-q", "--", path.name]
    done = subprocess.run(words, capture_output=True, check=False)  # noqa: S603 - fixed words
    return done.returncode == 1


def _content(look: _Look, path: Path, size: int) -> bytes | None:
    """The content of a file, with what is wrong with it noted; None where it must not be read."""
    name = path.name
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", name):
        hidden = name.startswith(".")
        why = (
            "is hidden"
            if hidden
            else "has a name with other characters than letters, digits, . _ -"
        )
        look.file(name, 0, f"{why}; rename it or take it away")
    tensors = path.suffix == ".safetensors"
    limit = MAX_WEIGHTS if tensors else MAX_TEXT
    if size > limit:
        look.file(name, 0, f"has {size:,} bytes, above the limit of {limit:,} for such a file")
    with path.open("rb") as file:
        data = file.read(limit)
    what = foreign(data)
    if what is not None:
        look.file(name, 0, f"is {what}; submissions hold source, text and safetensors alone")
        return None
    if path.suffix not in ENDINGS and name not in ("LICENSE", "LICENCE"):
        if not name.startswith("."):
            ending = f"has the ending {path.suffix!r}" if path.suffix else "has no ending"
            look.file(name, 0, f"{ending}; allowed are {', '.join(ENDINGS)} and LICENSE")
        return None
    if path.suffix == ".yaml" and name != FILE:
        look.file(name, 0, f"is YAML, and {FILE} is the only such file")
        return None
    if size > limit:
        return None
    wrong = [(0, text) for text in safetensors_problems(data)] if tensors else text_problems(data)
    for line, text in wrong[:MOST]:
        look.file(name, line, text)
    if path.suffix == ".py" and not any("UTF-8" in text for _, text in wrong):
        _python(look, name, data)
    return data


def _python(look: _Look, name: str, data: bytes) -> None:
    tree = _parsed(look, name, data)
    if tree is None or name.startswith("test_"):
        return
    for node in ast.walk(tree):
        for what in _unsafe(node):
            words = f"{what} runs code that is hidden in data; read weights with safetensors"
            look.file(name, getattr(node, "lineno", 0), words)


def _parsed(look: _Look, name: str, data: bytes) -> ast.Module | None:
    try:
        return ast.parse(data)
    except SyntaxError as error:
        look.file(name, error.lineno or 1, f"is not Python: {error.msg}")
    except (ValueError, RecursionError, MemoryError) as error:
        look.file(name, 1, f"is not Python: {error}")
    return None


def _unsafe(node: ast.AST) -> Iterator[str]:
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        names = [node.module]
    yield from (one for one in names if one.partition(".")[0] in UNSAFE)
    if isinstance(node, ast.Attribute):
        called = ast.unparse(node) if isinstance(node.value, ast.Name | ast.Attribute) else ""
        if called in UNSAFE_CALLS:
            yield called


# --- submission.yaml -----------------------------------------------------------------------------


def _described(look: _Look, data: bytes, contents: Mapping[str, bytes]) -> Submission | None:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return None  # told already
    marked = look.marked = read_marked(text)
    for line, words in marked.problems:
        look.file(FILE, line, words)
    values = marked.values
    if not isinstance(values, Mapping):
        if not marked.problems:
            look.file(FILE, 1, "holds no fields; see docs/submitting.md")
        return None
    submission, wrong = attempt(Submission, values, "submission")
    for place, words in wrong:
        look.said(place, words.replace("submission.", "", 1).replace("parameter ", "field ", 1))
    for check in (_name, _component, _targets, _protocols, _claims, _learned, _supersedes):
        check(look, values, contents)
    _weights(look, values, contents)
    return submission


def _name(look: _Look, values: Mapping[str, Json], contents: Mapping[str, bytes]) -> None:  # noqa: ARG001
    name = values.get("name")
    folder = look.folder.resolve()
    if not isinstance(name, str):
        return
    if name != folder.name:
        look.said(("name",), f"is {name!r}, and the folder is called {folder.name!r}; use one name")
    for kind, registry in REGISTRIES.items():
        if name in registry or name == SUITE:
            words = f"{name!r} is the name of a built-in {kind} already; choose another"
            look.said(("name",), words)
            break
    for other, their, line in _neighbours(folder):
        if their.casefold() == name.casefold():
            words = f"{name!r} is the name of another submission, see {other}/{FILE}:{line}"
            look.said(("name",), words)


def _neighbours(folder: Path) -> Iterator[tuple[str, str, int]]:
    """The folders beside this one with the names that they give themselves, and where."""
    for path in sorted(folder.parent.iterdir()):
        described = path / FILE
        if path == folder or not re.fullmatch(NAME, path.name) or not described.is_file():
            continue
        try:
            marked = read_marked(described.read_bytes()[:MAX_TEXT].decode("utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        values = marked.values
        name = values.get("name") if isinstance(values, Mapping) else None
        if isinstance(name, str):
            yield path.name, name, marked.line(("name",))


def _component(look: _Look, values: Mapping[str, Json], contents: Mapping[str, bytes]) -> None:
    component, kind = values.get("component"), values.get("kind")
    registry = REGISTRIES.get(kind) if isinstance(kind, str) else None
    known: set[str] = set()
    if isinstance(component, str) and PLACEHOLDER not in component:
        if ".py" not in component and "/" not in component and "\\" not in component:
            _builtin(look, registry, component, values)
        elif not COMPONENT.fullmatch(component):
            words = (
                f"{component!r} is not of the form defense.py:Class, a file of the folder itself; "
                "nothing outside it is read"
            )
            look.said(("component",), words)
        else:
            known.add(component.partition(":")[0])
            _class(look, component, values.get("name"), contents)
    for name in contents:
        if name.endswith(".py") and not name.startswith("test_") and name not in known and known:
            words = (
                "is not the component's file and no test_*.py; a method is one file, since the "
                "record knows the code of that file alone"
            )
            look.file(name, 0, words)


def _builtin(
    look: _Look, registry: Registry[Any] | None, name: str, values: Mapping[str, Json]
) -> None:
    if registry is None:
        return
    if name not in registry:
        words = f"{unknown(registry.kind, name, registry.names())}; or a class of your own, as in "
        look.said(("component",), f"{words}{registry.kind}.py:Class")
        return
    params = values.get("params")
    if not params:
        words = f"the built-in {name} is there already; say with params what is other about this"
        look.said(("component",), words)
    elif isinstance(params, Mapping):
        _params(look, registry, name, params, ("params",))


def _params(
    look: _Look, registry: Registry[Any], name: str, params: Mapping[str, Json], place: Place
) -> None:
    """Parameters of a built-in; those of a class in the folder are checked when it may run."""
    for at, words in attempt(registry.load(name).Params, params, f"{registry.kind} {name}")[1]:
        look.said((*place, *at), words)


def _class(look: _Look, component: str, name: Json, contents: Mapping[str, bytes]) -> None:
    file, _, wanted = component.partition(":")
    if file not in contents:
        if not (look.folder / file).exists():
            look.said(("component",), f"names {file!r}, and there is no such file in the folder")
        return
    try:
        tree = ast.parse(contents[file])
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return  # told already
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if wanted not in classes:
        words = f"names the class {wanted!r}, which {file} does not have; {hint(wanted, classes)}"
        look.said(("component",), words)
        return
    node = classes[wanted]
    label = next((found for found in map(_label, node.body) if found), dashed(wanted))
    if isinstance(name, str) and label != name:
        words = (
            f"the class {wanted} would be called {label!r} on the board, not {name!r} like the "
            f'submission; write name = "{name}" in it'
        )
        look.file(file, node.lineno, words)


def _label(node: ast.stmt) -> str | None:
    """The name that a class gives itself, if this statement does."""
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign):
        targets = [node.target]
    else:
        return None
    named = any(isinstance(one, ast.Name) and one.id == "name" for one in targets)
    value = node.value.value if named and isinstance(node.value, ast.Constant) else None
    return value if isinstance(value, str) else None


def _targets(look: _Look, values: Mapping[str, Json], contents: Mapping[str, bytes]) -> None:  # noqa: ARG001
    kind, targets = values.get("kind"), values.get("targets") or []
    if kind == "defense" and targets:
        look.said(("targets",), "a defense has no targets: it meets all attacks of its protocol")
    if kind == "attack" and not targets:
        look.said(("targets",), "name the built-in defenses that the attack is run against")
    for at, one in enumerate(targets if isinstance(targets, list) else []):
        name, params = (
            (one.get("name"), one.get("params")) if isinstance(one, Mapping) else (one, {})
        )
        if not isinstance(name, str):
            continue  # told by its type
        if name not in defenses:
            look.said(("targets", at), unknown("defense", name, defenses.names()))
        elif params and isinstance(params, Mapping):
            _params(look, defenses, name, params, ("targets", at, "params"))


def _protocols(look: _Look, values: Mapping[str, Json], contents: Mapping[str, bytes]) -> None:  # noqa: ARG001
    for key in ("protocols", "seeds"):
        listed = values.get(key)
        seen: list[Json] = []
        for at, one in enumerate(listed if isinstance(listed, list) else []):
            if one in seen:
                look.said((key, at), f"{key}: {one!r} is there twice")
            elif key == "protocols" and isinstance(one, str) and one not in released():
                look.said((key, at), unknown("protocol", one, released()))
            seen.append(one)


def _claims(look: _Look, values: Mapping[str, Json], contents: Mapping[str, bytes]) -> None:  # noqa: ARG001
    claims, protocols = values.get("claims"), values.get("protocols")
    for protocol, numbers in (claims if isinstance(claims, Mapping) else {}).items():
        if isinstance(protocols, list) and protocol not in protocols:
            look.said(("claims", protocol), f"{protocol!r} is none of the submission's protocols")
        for name, value in (numbers if isinstance(numbers, Mapping) else {}).items():
            place = ("claims", protocol, name)
            if name not in RANGES:
                look.said(place, unknown("number to claim", name, RANGES))
            elif isinstance(value, int | float) and not isinstance(value, bool):
                low, high = RANGES[name]
                if not low <= value <= high:
                    text = f"claims {name} = {value}, outside {low:g} to {high:g}"
                    if name != "mse" and (low, high) == (0, 1) and 1 < value <= 100:
                        text += f"; a share, not per cent: {value / 100:g}?"
                    look.said(place, text)


def _learned(look: _Look, values: Mapping[str, Json], contents: Mapping[str, bytes]) -> None:  # noqa: ARG001
    listed, kind = values.get("training_data"), values.get("kind")
    listed = listed if isinstance(listed, list) else []
    barred = {"defense": "auxiliary", "attack": "train"}.get(str(kind))
    for at, one in enumerate(listed):
        if one == barred:
            words = f"the role {one!r} belongs to the other side: a {kind} must not learn from it"
            look.said(("training_data", at), words)
        if one == "none" and len(listed) > 1:
            look.said(("training_data", at), "'none' stands alone")


def _supersedes(look: _Look, values: Mapping[str, Json], contents: Mapping[str, bytes]) -> None:  # noqa: ARG001
    earlier = values.get("supersedes")
    if not isinstance(earlier, str) or not re.fullmatch(NAME, earlier):
        return
    there = look.folder.resolve().parent / earlier / FILE
    if not there.is_file():
        look.said(("supersedes",), f"there is no submission {earlier!r} beside this one")
        return
    theirs = read_marked(there.read_bytes()[:MAX_TEXT].decode("utf-8", errors="replace")).values
    had = theirs.get("authors") if isinstance(theirs, Mapping) else None
    has = values.get("authors")
    if isinstance(had, list) and isinstance(has, list) and not any(one in had for one in has):
        words = f"none of the authors of {earlier!r} is among the authors here"
        look.said(("supersedes",), words)


def _weights(look: _Look, values: Mapping[str, Json], contents: Mapping[str, bytes]) -> None:
    listed = values.get("weights")
    named: set[str] = set()
    for at, one in enumerate(listed if isinstance(listed, list) else []):
        name = one.get("file") if isinstance(one, Mapping) else None
        if not isinstance(name, str):
            continue
        named.add(name)
        if name not in contents:
            if "/" not in name and not (look.folder / name).exists():
                look.said(("weights", at), f"there is no file {name!r} in the folder")
            continue
        digest = hashlib.sha256(contents[name]).hexdigest()
        if isinstance(one, Mapping) and one.get("sha256") != digest:
            look.said(("weights", at), f"{name} has another content: its SHA-256 is {digest}")
    for name in contents:
        if name.endswith(".safetensors") and name not in named:
            look.file(name, 0, f"is not listed under weights in {FILE}")


def _one_line(text: str) -> str:
    plain = _printable(text)
    return plain if len(plain) <= 500 else plain[:497] + "..."


def _printable(text: str) -> str:
    """Foreign text on one line, without what could steer a terminal or a page."""
    return " ".join("".join(c if c.isprintable() else "?" for c in text).split())


def content_of(folder: Path) -> str:
    """Returns a hash over names and bytes of all files of a submission, 16 digits.

    Raises:
        SubmissionError: a file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in sorted(one for one in folder.iterdir() if one.is_file()):
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    except OSError as error:
        raise SubmissionError([f"{folder}: cannot be read: {error.strerror}"]) from error
    return digest.hexdigest()[:16]
