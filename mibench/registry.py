"""What there is: one registry per kind of component, listed without importing any of them.

A built-in is one file with one decorated class; the listing reads its source and never runs it.
Other components come from entry points of installed distributions, or by location
(`package.module:Class`, `./file.py:Class`).
"""

import ast
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import sys
import textwrap
import threading
import traceback
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from mibench.errors import PluginError, UnknownNameError
from mibench.suggest import hint, unknown

if TYPE_CHECKING:
    from mibench.attacks.base import Attack
    from mibench.backbones.base import Backbone
    from mibench.data.base import Dataset
    from mibench.defenses.base import Defense
    from mibench.information.base import Measure
    from mibench.metrics.base import Metric

T = TypeVar("T")
C = TypeVar("C")

_NAME = re.compile(r"[a-z0-9][a-z0-9_.+-]*")

# Frames of these say nothing of where a plugin went wrong.
_MACHINERY = (__file__, str(Path(importlib.__file__).parent))

# The text that file plugins were run from: the file may have been edited since.
_sources: dict[str, bytes] = {}


@dataclass(frozen=True)
class Entry:
    """A component as the listing knows it, without having imported it."""

    kind: str
    name: str
    location: str
    """`module:Class`"""
    summary: str
    """First line of the class's docstring; empty where its source was not found"""
    facts: Mapping[str, str | int] = field(default_factory=dict, hash=False)
    """Literal keyword arguments of the decorator; `version` is always among them"""
    origin: str = ""
    """`mibench`, the name of a distribution, or the path of a file"""


@dataclass(frozen=True)
class _Found:
    """A class as read from source."""

    name: str | None
    class_name: str
    summary: str
    facts: dict[str, str | int]


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0].strip()


def _literal(node: ast.expr) -> object:
    try:
        value: object = ast.literal_eval(node)
    except ValueError:
        return None
    return value


def _read_classes(source: bytes) -> list[_Found]:
    """Classes at the top of a module; `name` is None for those that no decorator registers."""
    found: list[_Found] = []
    for node in ast.parse(source).body:
        if not isinstance(node, ast.ClassDef):
            continue
        summary = _first_line(ast.get_docstring(node))
        calls = [
            call
            for call in node.decorator_list
            if isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr == "register"
        ]
        if not calls:
            found.append(_Found(None, node.name, summary, {"version": 1}))
        for call in calls:
            name = _literal(call.args[0]) if call.args else None
            if not isinstance(name, str):
                raise SyntaxError(f"{node.name} must be registered under a literal name")
            facts: dict[str, str | int] = {"version": 1}
            for keyword in call.keywords:
                value = _literal(keyword.value)
                if keyword.arg is not None and isinstance(value, str | int):
                    facts[keyword.arg] = value
            found.append(_Found(name, node.name, summary, facts))
    return found


def _place(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _file_of(cls: type) -> Path | None:
    path = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return Path(path).resolve() if path else None


def _same_place(one: type, other: type) -> bool:
    """Whether two class objects are one class, imported again or under another module name."""
    if one.__qualname__ != other.__qualname__:
        return False
    file = _file_of(one)
    return one.__module__ == other.__module__ or (file is not None and file == _file_of(other))


def dashed(class_name: str) -> str:
    """The name of a class that has none of its own: ``ChannelNoise`` is ``channel-noise``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|_", "-", class_name).lower()


def _failure(error: BaseException, file: Path | None = None) -> str:
    """One line: file, line, type and message; the line is the one in `file` if it was reached."""
    message = " ".join(str(error).split())
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((*_MACHINERY, "<frozen "))
    ]
    inside = [frame for frame in frames if file is not None and frame.filename == str(file)]
    where, line = str(file or ""), None
    if isinstance(error, SyntaxError) and error.filename:
        line, message = error.lineno, error.msg
        where = where if error.filename == "<unknown>" else error.filename
    elif inside:
        line = inside[-1].lineno
    elif frames and file is None:
        where, line = frames[-1].filename, frames[-1].lineno
    at = where if line is None else f"{where}, line {line}"
    return f"{at}{at and ': '}{type(error).__name__}: {message}"


def _import_file(path: Path) -> types.ModuleType:
    """Run a file as a module of its own, once for each content."""
    try:
        source = path.read_bytes()
    except OSError as error:
        raise PluginError(f"cannot read {path}: {error.strerror}") from error
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()[:12]
    name = f"mibench_plugin_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}_{digest}"
    if name in sys.modules:
        return sys.modules[name]
    module = types.ModuleType(name)
    module.__file__ = str(path)
    # in sys.modules before it runs: dataclasses, pydantic and pickle look their module up there
    sys.modules[name] = module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)  # noqa: S102 - a plugin is code
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise PluginError(f"cannot import {_failure(error, path)}") from error
    except BaseException:
        del sys.modules[name]
        raise
    _sources[name] = source
    return module


class Registry(Generic[T]):
    """Named components of one kind.

    Args:
        kind: What messages call a component, such as `defense`.
        base: `module:Class` that every component derives from; imported at the first `load`.
        package: The package whose files hold the built-in components.
        group: The entry-point group in which distributions offer more of them.
    """

    def __init__(self, kind: str, *, base: str, package: str, group: str) -> None:
        self.kind = kind
        self.package = package
        self.group = group
        self._base = base
        self._registered: dict[str, tuple[type, Entry]] = {}
        self._broken: list[str] = []
        self._loading: importlib.metadata.EntryPoint | None = None
        self._lock = threading.RLock()

    # --- what there is --------------------------------------------------------------------------

    @cached_property
    def _builtin(self) -> dict[str, Entry]:
        """Built-in components by name, from the source of the package's files."""
        # finding a subpackage imports only what is above it, never the subpackage
        spec = importlib.util.find_spec(self.package)
        found: dict[str, Entry] = {}
        for folder in (spec and spec.submodule_search_locations) or []:
            for path in sorted(Path(folder).rglob("*.py")):
                parts = path.relative_to(folder).with_suffix("").parts
                if parts[-1] == "base" or any(part.startswith(("_", ".")) for part in parts):
                    continue
                module = ".".join((self.package, *parts))
                try:
                    classes = _read_classes(path.read_bytes())
                except (SyntaxError, ValueError) as error:
                    # a file that is being edited must not hide all the others
                    self._broken.append(_failure(error, path))
                    warnings.warn(f"left out {self._broken[-1]}", stacklevel=2)
                    continue
                for item in classes:
                    if item.name is None:
                        continue
                    location = f"{module}:{item.class_name}"
                    if item.name in found:
                        raise PluginError(
                            f"two {self.kind}s are called {item.name!r}: "
                            f"{found[item.name].location} and {location}; rename one"
                        )
                    origin = self.package.partition(".")[0]
                    found[item.name] = Entry(
                        self.kind, item.name, location, item.summary, item.facts, origin
                    )
        return found

    @cached_property
    def _offered(self) -> list[tuple[str, importlib.metadata.EntryPoint]]:
        """Entry points with the distribution that offers each."""
        points = importlib.metadata.entry_points(group=self.group)
        return sorted(
            ((point.dist.name if point.dist else "?", point) for point in points),
            key=lambda pair: (pair[0], pair[1].name),
        )

    @cached_property
    def _points(self) -> dict[str, tuple[str, importlib.metadata.EntryPoint]]:
        """Entry points by the name that they are listed under."""
        plain = [point.name for _, point in self._offered]
        return {
            f"{dist}/{point.name}"
            if point.name in self._builtin or plain.count(point.name) > 1
            else point.name: (dist, point)
            for dist, point in self._offered
        }

    def _point_entry(self, name: str, dist: str, point: importlib.metadata.EntryPoint) -> Entry:
        module, _, class_name = point.value.partition(":")
        summary, facts = "", cast("dict[str, str | int]", {"version": 1})
        stem = module.strip().replace(".", "/")
        for tail in (".py", "/__init__.py"):
            try:
                path = Path(str(point.dist.locate_file(stem + tail))) if point.dist else None
                found = _read_classes(path.read_bytes()) if path else []
            except (OSError, SyntaxError, ValueError):
                continue  # elsewhere (an editable install) or broken: loading it will tell
            for item in found:
                if item.class_name == class_name.strip():
                    summary, facts = item.summary, item.facts
        return Entry(self.kind, name, point.value, summary, facts, dist)

    def names(self) -> list[str]:
        """All names that `load` knows, sorted; imports no component."""
        # a registered class may be the one that an entry point or a built-in file names
        return sorted({*self._builtin, *self._points, *self._registered})

    def entries(self) -> list[Entry]:
        """All entries, sorted by name; imports no component."""
        return [self.entry(name) for name in self.names()]

    def entry(self, name: str) -> Entry:
        """What is known of one component without importing it.

        Args:
            name: As `names` lists it, or `distribution/name` of an entry point.

        Returns:
            The entry.

        Raises:
            UnknownNameError: If there is no such name.
        """
        if name in self._builtin:
            return self._builtin[name]
        point = self._find_point(name)
        if point is not None:
            return self._point_entry(name, *point)
        if name in self._registered:
            return self._registered[name][1]
        raise UnknownNameError(self._unknown(name))

    def _find_point(self, name: str) -> tuple[str, importlib.metadata.EntryPoint] | None:
        if name in self._points:
            return self._points[name]
        for dist, point in self._offered:
            if name == f"{dist}/{point.name}":
                return dist, point
        return None

    def _unknown(self, name: str) -> str:
        left_out = f" (left out: {'; '.join(self._broken)})" if self._broken else ""
        return unknown(self.kind, name, self.names()) + left_out

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (
            name in self.names() or self._find_point(name) is not None
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self.names())

    def __repr__(self) -> str:
        return f"<Registry of {self.kind}s: {', '.join(self.names()) or 'none'}>"

    # --- registering ----------------------------------------------------------------------------

    def register(
        self, name: str, *, version: int = 1, **facts: str | int
    ) -> Callable[[type[C]], type[C]]:
        """Decorate a class to give it a name and a version.

        Args:
            name: Lower case, unique among the registry's names. Write it as a literal, and the
                facts too: the listing reads them from the source.
            version: Raise it when the component's results change.
            **facts: More for the listing, such as `paper` or `knowledge`.

        Returns:
            The decorator. It sets the class's attributes `name` and `version`.

        Raises:
            PluginError: If the name is not well-formed or the version below 1; the decorator
                raises it if a different class has the name.
        """
        if not _NAME.fullmatch(name):
            raise PluginError(
                f"{name!r} cannot be a {self.kind}'s name: use a-z, 0-9, '-', '_', '.' and '+'"
            )
        if version < 1:
            raise PluginError(f"{self.kind} {name!r} has version {version}; versions start at 1")

        def decorate(cls: type[C]) -> type[C]:
            full = name
            point = self._loading
            if point is not None and point.name == name and point.dist is not None:
                qualified = f"{point.dist.name}/{name}"
                full = qualified if qualified in self._points else name
            self._refuse_taken(full, cls)
            entry = Entry(
                self.kind,
                full,
                _place(cls),
                _first_line(cls.__doc__),
                {"version": version, **facts},
                str(_file_of(cls) or cls.__module__),
            )
            labelled = cast("Any", cls)
            labelled.name, labelled.version = full, version
            self._registered[full] = (cls, entry)
            return cls

        return decorate

    def _refuse_taken(self, name: str, cls: type) -> None:
        other: str | None = None
        if name in self._registered and not _same_place(self._registered[name][0], cls):
            other = _place(self._registered[name][0])
        if name in self._builtin and not self._is_builtin(self._builtin[name], cls):
            other = self._builtin[name].location
        if other is not None:
            raise PluginError(
                f"two {self.kind}s are called {name!r}: {other} and {_place(cls)}"
                f"{_in_file(cls)}; rename one"
            )

    def _is_builtin(self, entry: Entry, cls: type) -> bool:
        if entry.location == _place(cls):
            return True
        module, _, class_name = entry.location.partition(":")
        file, tail = _file_of(cls), module.removeprefix(self.package + ".").split(".")
        spec = importlib.util.find_spec(self.package)
        return cls.__qualname__ == class_name and any(
            Path(folder, *tail).with_suffix(".py").resolve() == file
            for folder in (spec and spec.submodule_search_locations) or []
        )

    # --- loading --------------------------------------------------------------------------------

    def load(self, name: str) -> type[T]:
        """Import a component's class.

        Args:
            name: A built-in's name, an entry point's (`name` or `distribution/name`), a registered
                class's, `package.module:Class`, or `./file.py:Class`.

        Returns:
            The class, checked against the registry's base.

        Raises:
            UnknownNameError: If there is no such name.
            PluginError: If a plugin cannot be imported, or its class does not do what every
                component of this kind must.
        """
        with self._lock:
            if name in self._builtin:
                module, _, class_name = self._builtin[name].location.partition(":")
                return self._checked(getattr(importlib.import_module(module), class_name), name)
            point = self._find_point(name)
            if point is not None:
                return self._load_point(name, *point)
            if name in self._registered:
                return self._checked(self._registered[name][0], name)
            return self._load_location(name)

    def _load_point(self, name: str, dist: str, point: importlib.metadata.EntryPoint) -> type[T]:
        listed = next(key for key, pair in self._points.items() if pair == (dist, point))
        before, self._loading = dict(self._registered), point
        try:
            loaded: object = point.load()
        except (Exception, SystemExit) as error:
            self._registered = before
            raise PluginError(
                f"{self.kind} {name!r} of the distribution {dist!r} cannot be imported: "
                f"{_failure(error)}"
            ) from error
        finally:
            self._loading = None
        cls = self._checked(loaded, f"{point.value} of the distribution {dist!r}")
        own = vars(cls).get("name")
        if own not in (None, listed, point.name):
            raise PluginError(
                f"the distribution {dist!r} offers {self.kind} {point.name!r}, but {_place(cls)} "
                f"is called {own!r}; give both one name"
            )
        self._label(cls, listed)
        return cls

    def _load_location(self, name: str) -> type[T]:
        where, colon, class_name = name.rpartition(":")
        if not colon or (len(where) == 1 and class_name[:1] in ("\\", "/")):  # a drive's colon
            where, class_name = name, ""
        has_slash = "/" in where or "\\" in where
        is_path = (
            where.endswith(".py")
            or where.startswith(("./", "../", "~", "/", ".\\"))
            or bool(class_name and has_slash)
        )
        if not is_path and not class_name:
            raise UnknownNameError(self._unknown(name))
        before = dict(self._registered)
        if is_path:
            path = Path(where).expanduser().resolve()
            if not where.endswith(".py"):
                raise PluginError(f"{name!r} is no plugin: write ./file.py:Class")
            if not path.is_file():
                raise PluginError(f"there is no file {where!r} (looked for {path})")
        try:
            module = _import_file(path) if is_path else importlib.import_module(where)
        except PluginError:
            self._registered = before
            raise
        except (Exception, SystemExit) as error:
            self._registered = before
            raise PluginError(f"cannot import {where!r}: {_failure(error)}") from error
        if not hasattr(module, class_name or " "):
            own = [
                item.__name__
                for item in vars(module).values()
                if isinstance(item, type) and item.__module__ == module.__name__
            ]
            lacks = f"has no class {class_name!r}" if class_name else "needs a class: write :Class"
            raise PluginError(f"{where} {lacks}; {hint(class_name, own)}")
        cls = self._checked(getattr(module, class_name), name)
        label = str(vars(cls).get("name", dashed(cls.__name__)))
        taken = self._builtin.get(label)
        if taken is not None and not self._is_builtin(taken, cls):
            raise PluginError(
                f"{name} would be called {label!r} like {taken.location}; "
                f"set another name in the class, such as name = 'my-{label}'"
            )
        self._label(cls, label)
        return cls

    def _label(self, cls: type, name: str) -> None:
        """Name a class that no decorator named."""
        labelled = cast("Any", cls)
        if vars(cls).get("name") != name:
            labelled.name = name
        if "version" not in vars(cls):
            labelled.version = 1

    @cached_property
    def base(self) -> type[T]:
        """The class that every component of this kind derives from; importing it may be slow."""
        module, _, class_name = self._base.partition(":")
        return cast("type[T]", getattr(importlib.import_module(module), class_name))

    def _checked(self, cls: object, called: str) -> type[T]:
        base = self.base
        if not isinstance(cls, type):
            raise PluginError(f"{called} is not a class but of type {type(cls).__name__}")
        if not issubclass(cls, base):
            raise PluginError(
                f"{called} is not a {self.kind}: {cls.__name__} must derive from {self._base}"
            )
        missing = set(getattr(cls, "__abstractmethods__", ()))
        required: tuple[str, ...] = getattr(base, "required", ())
        for method in required:
            # static lookup: a class method is a new object each time it is got
            own = inspect.getattr_static(cls, method, None)
            if own is inspect.getattr_static(base, method, None):
                missing.add(method)
        if missing:
            raise PluginError(
                f"{called} is not complete: {cls.__name__} lacks {', '.join(sorted(missing))}"
            )
        return cls


def _in_file(cls: type) -> str:
    file = _file_of(cls)
    return f" ({file})" if file is not None else ""


# --- fingerprints -------------------------------------------------------------------------------


def _normal(node: object) -> str:
    """A syntax tree as text, without positions, docstrings and empty fields.

    Like `ast.dump`, whose text is not the same in all versions of Python: later ones have fields
    that are empty in older code.
    """
    if isinstance(node, ast.AST):
        fields = (
            f"{name}={_normal(value)}"
            for name, value in ast.iter_fields(node)
            if value is not None and value != []
        )
        return f"{type(node).__name__}({','.join(fields)})"
    if isinstance(node, list):
        return f"[{','.join(_normal(item) for item in node if not _is_remark(item))}]"
    return repr(node)


def _is_remark(node: object) -> bool:
    """Whether a statement is a bare string: a docstring, or the words under an attribute."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def fingerprint(cls: type) -> str:
    """Hash of the code of the module that defines a class.

    Comments, docstrings and layout do not count. Other modules that the class uses do not either:
    `lineage` covers its ancestors, `imported_fingerprint` and `package_fingerprint` its helpers.

    Args:
        cls: The class.

    Returns:
        The first 16 hexadecimal digits of a SHA-256.

    Raises:
        PluginError: If the source cannot be had, as for a class typed into a prompt.
    """
    return hashlib.sha256(_normal(_tree(cls)).encode()).hexdigest()[:16]


def _tree(cls: type) -> ast.Module:
    source: bytes | str | None = _sources.get(cls.__module__)
    if source is None:
        file = _file_of(cls)
        try:
            if file is not None and file.suffix == ".py":
                source = file.read_bytes()
            else:
                source = textwrap.dedent(inspect.getsource(cls))
        except (OSError, TypeError) as error:
            raise PluginError(
                f"the source of {_place(cls)} cannot be had; put the class into a file"
            ) from error
    return ast.parse(source)


def lineage(cls: type) -> list[str]:
    """Fingerprints of a class and of its ancestors, those of other libraries left out.

    Raises:
        PluginError: As `fingerprint`.
    """
    return [fingerprint(one) for one in _own(cls)]


def _own(cls: type) -> list[type]:
    foreign = {"abc", "builtins", "pydantic", "torch", "typing"}
    return [one for one in cls.__mro__ if one.__module__.partition(".")[0] not in foreign]


def imported_fingerprint(cls: type, package: str) -> str:
    """Hash of the code of those modules of a package that a class and its ancestors import.

    What these import from the same package counts too. An edit of a helper thus concerns its users
    alone.

    Args:
        cls: The class.
        package: Such as ``mibench.defenses.parts``.

    Raises:
        PluginError: As `fingerprint`.
    """
    waiting = [name for one in _own(cls) for name in _imports(_tree(one), package)]
    found: dict[str, str] = {}
    while waiting:
        name = waiting.pop()
        spec = importlib.util.find_spec(name)
        if name in found or spec is None or spec.origin is None:
            continue
        tree = ast.parse(Path(spec.origin).read_bytes())
        found[name] = _normal(tree)
        waiting += _imports(tree, package)
    text = "\n".join(f"{name} {found[name]}" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _imports(tree: ast.Module, package: str) -> list[str]:
    """Names of the modules of a package that a file imports, in whatever form."""
    found: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == package:
            found += [f"{package}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
    return [name for name in found if name.startswith(f"{package}.")]


@functools.cache
def package_fingerprint(name: str) -> str:
    """Hash of the code of all modules of a package, docstrings and comments left out."""
    digest = hashlib.sha256()
    spec = importlib.util.find_spec(name)
    for folder in sorted(spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).rglob("*.py")):
            digest.update(_normal(ast.parse(file.read_bytes())).encode())
    return digest.hexdigest()[:16]


# --- the registries -----------------------------------------------------------------------------

defenses: Registry["Defense"] = Registry(
    "defense",
    base="mibench.defenses.base:Defense",
    package="mibench.defenses",
    group="mibench.defenses",
)
attacks: Registry["Attack"] = Registry(
    "attack",
    base="mibench.attacks.base:Attack",
    package="mibench.attacks",
    group="mibench.attacks",
)
datasets: Registry["Dataset"] = Registry(
    "dataset",
    base="mibench.data.base:Dataset",
    package="mibench.data",
    group="mibench.datasets",
)
backbones: Registry["Backbone"] = Registry(
    "backbone",
    base="mibench.backbones.base:Backbone",
    package="mibench.backbones",
    group="mibench.backbones",
)
metrics: Registry["Metric"] = Registry(
    "metric",
    base="mibench.metrics.base:Metric",
    package="mibench.metrics",
    group="mibench.metrics",
)
measures: Registry["Measure"] = Registry(
    "measure",
    base="mibench.information.base:Measure",
    package="mibench.information",
    group="mibench.measures",
)
