"""Registries: listed without imports, loaded from everywhere, refused in one clear line."""

import importlib
import itertools
import pickle
import subprocess
import sys
import textwrap

import pytest

from mibench import registry
from mibench.errors import PluginError, UnknownNameError
from mibench.registry import Entry, Registry, fingerprint, imported_fingerprint

BASE = """
from abc import ABC, abstractmethod
from typing import ClassVar

class Thing(ABC):
    required: ClassVar[tuple[str, ...]] = ("act", "make")

    @abstractmethod
    def must(self): ...

    def act(self):
        raise NotImplementedError

    @classmethod
    def make(cls):
        raise NotImplementedError
"""

BODY = """
    def must(self): return 1
    def act(self): return 2
    @classmethod
    def make(cls): return cls()
"""

counter = itertools.count()


class World:
    """A throw-away package `kitN` with a subpackage of things, and a registry of it."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.top = f"kit{next(counter)}"
        self.package = f"{self.top}.things"
        self.group = self.package
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.chdir(folder)
        self.write(f"{self.top}/__init__.py", "")
        # importing the subpackage's __init__ would be seen
        self.write(f"{self.top}/things/__init__.py", "import kit_heavy_and_absent")
        self.write(f"{self.top}/base.py", BASE)
        self.registry = self.fresh()
        self.write(
            f"{self.top}/registry.py",
            "things = None  # set by the test",
        )

    def fresh(self):
        return Registry(
            "thing", base=f"{self.top}.base:Thing", package=self.package, group=self.group
        )

    def write(self, path, text):
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text), encoding="utf-8")
        return file

    def connect(self):
        """Let the package's files be imported, and register with this world's registry."""
        self.write(f"{self.top}/things/__init__.py", "")
        module = __import__(f"{self.top}.registry", fromlist=["things"])
        module.things = self.registry

    def source(self, name, cls="Some", doc="A thing.", facts="", body=BODY):
        return (
            f"from {self.top}.base import Thing\nfrom {self.top}.registry import things\n\n"
            f"@things.register({name!r}{facts})\nclass {cls}(Thing):\n"
            f'    """{doc}"""\n{textwrap.indent(textwrap.dedent(body), "    ")}\n'
        )

    def plain(self, cls="Some", head="", body=BODY, base="Thing"):
        return (
            f"from {self.top}.base import Thing\n{head}\n"
            f"class {cls}({base}):\n    pass\n{textwrap.indent(textwrap.dedent(body), '    ')}\n"
        )

    def builtin(self, path, *args, **kwargs):
        return self.write(f"{self.top}/things/{path}", self.source(*args, **kwargs))

    def distribution(self, name, points):
        text = "".join(f"{key} = {value}\n" for key, value in points.items())
        self.write(
            f"{name.replace('-', '_')}-1.0.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        )
        self.write(
            f"{name.replace('-', '_')}-1.0.dist-info/entry_points.txt", f"[{self.group}]\n{text}"
        )


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def refusal(call, *args, error=PluginError):
    with pytest.raises(error) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- built-ins ----------------------------------------------------------------------------------


def test_listing_reads_source_and_imports_nothing(world):
    world.builtin(
        "one.py", "one", cls="One", doc="First.\n\n    More.", facts=', version=3, paper="P 2020"'
    )
    world.builtin("deep/er/two.py", "two", doc="Second.", facts=", knowledge=UNKNOWN, year=2020")
    world.builtin("base.py", "no-base")
    world.builtin("_private.py", "no-private")
    world.builtin("_hidden/three.py", "no-hidden")
    world.write(f"{world.top}/things/helper.py", "import torch_is_not_here\nclass Help: pass\n")
    before = set(sys.modules)
    things = world.registry
    assert things.names() == ["one", "two"]
    assert list(things) == ["one", "two"]
    assert len(things) == 2
    assert "one" in things
    assert "three" not in things
    assert 1 not in things
    assert repr(things) == "<Registry of things: one, two>"
    assert things.entry("one") == Entry(
        kind="thing",
        name="one",
        location=f"{world.package}.one:One",
        summary="First.",
        facts={"version": 3, "paper": "P 2020"},
        origin=world.top,
    )
    two = things.entries()[1]
    assert two.location == f"{world.package}.deep.er.two:Some"
    assert two.facts == {"version": 1, "year": 2020}
    assert hash(two)
    assert pickle.loads(pickle.dumps(two)) == two
    assert set(sys.modules) - before == {world.top}


def test_a_new_file_is_all_it_takes(world):
    world.builtin("one.py", "one")
    assert world.fresh().names() == ["one"]
    world.builtin("two.py", "two")
    assert world.fresh().names() == ["one", "two"]


def test_builtin_is_loaded_and_labelled(world):
    world.builtin("one.py", "one", facts=", version=2")
    world.connect()
    cls = world.registry.load("one")
    assert (cls.name, cls.version) == ("one", 2)
    assert world.registry.load("one") is cls
    assert issubclass(cls, world.registry.base)
    assert world.registry.names() == ["one"]


def test_two_builtins_of_one_name(world):
    world.builtin("one.py", "same")
    world.builtin("two.py", "same")
    message = refusal(world.registry.names)
    assert f"{world.package}.one:Some" in message
    assert f"{world.package}.two:Some" in message


def test_a_broken_builtin_hides_no_other(world):
    world.builtin("one.py", "one")
    world.write(f"{world.top}/things/bad.py", "x = 1\ndef (:\n")
    world.write(
        f"{world.top}/things/computed.py", "@things.register('a' + x)\nclass Computed: pass\n"
    )
    with pytest.warns(UserWarning, match="left out"):
        assert world.registry.names() == ["one"]
    message = refusal(world.registry.load, "bad", error=UnknownNameError)
    assert "bad.py, line 2: SyntaxError" in message
    assert "Computed must be registered under a literal name" in message


def test_a_package_without_folder_has_no_builtins():
    things = Registry("thing", base="a:B", package="mibench.nothing_here", group="no.such")
    assert things.names() == []
    assert repr(things) == "<Registry of things: none>"


def test_unknown_names(world):
    world.builtin("one.py", "privdfs")
    message = refusal(world.registry.load, "privdf", error=UnknownNameError)
    assert message == "unknown thing 'privdf'; did you mean 'privdfs'? There are: privdfs"
    assert refusal(world.registry.entry, "privdf", error=UnknownNameError) == message
    assert "unknown thing 'a/b'" in refusal(world.registry.load, "a/b", error=UnknownNameError)


# --- register -----------------------------------------------------------------------------------


def test_register_in_process(world):
    @world.registry.register("mine", version=4, paper="P")
    class Mine:
        """Mine.

        And more.
        """

    assert (Mine.name, Mine.version) == ("mine", 4)
    entry = world.registry.entry("mine")
    assert entry.summary == "Mine."
    assert entry.facts == {"version": 4, "paper": "P"}
    assert entry.origin == __file__
    assert "mine" in world.registry.names()


def test_one_name_two_classes(world):
    def first():
        @world.registry.register("mine")
        class Mine: ...

        return Mine

    first()
    first()  # the same class made again: a module that is reloaded does this

    with pytest.raises(PluginError, match=r"two things are called 'mine'.*first.*Other"):

        @world.registry.register("mine")
        class Other: ...


def test_a_builtin_keeps_its_name(world):
    world.builtin("one.py", "one")
    with pytest.raises(PluginError, match="two things are called 'one'") as caught:

        @world.registry.register("one")
        class Mine: ...

    assert f"{world.package}.one:Some" in str(caught.value)
    assert __file__ in str(caught.value)


@pytest.mark.parametrize("name", ["", "A", "a b", "a:b", "a/b", "-a"])
def test_names_that_could_not_be_typed(world, name):
    assert repr(name) in refusal(world.registry.register, name)


def test_versions_start_at_one(world):
    with pytest.raises(PluginError, match="version 0"):
        world.registry.register("a", version=0)


# --- entry points -------------------------------------------------------------------------------


def test_entry_points_are_listed_without_import(world):
    world.builtin("one.py", "one")
    world.write("acme_a.py", world.source("extra", doc="Extra.", facts=", paper='Q'"))
    world.distribution("acme-dp", {"extra": "acme_a:Some", "gone": "acme_gone:Some"})
    things = world.registry
    assert things.names() == ["extra", "gone", "one"]
    entry = things.entry("extra")
    assert (entry.summary, entry.origin) == ("Extra.", "acme-dp")
    assert entry.facts == {"version": 1, "paper": "Q"}
    assert things.entry("gone").summary == ""
    assert "acme-dp/extra" in things
    assert "acme_a" not in sys.modules


def test_entry_points_are_loaded(world):
    world.connect()
    world.write("acme_b.py", world.source("extra", facts=", version=5"))
    world.write("acme_c.py", world.plain(cls="Bare"))
    world.distribution("acme-dp", {"extra": "acme_b:Some", "bare": "acme_c:Bare"})
    cls = world.registry.load("extra")
    assert (cls.name, cls.version) == ("extra", 5)
    assert world.registry.load("acme-dp/extra") is cls
    bare = world.registry.load("bare")
    assert (bare.name, bare.version) == ("bare", 1)
    assert world.registry.names() == ["bare", "extra"]


def test_an_entry_point_named_like_a_builtin(world):
    world.builtin("one.py", "one")
    world.connect()
    world.write("acme_d.py", world.source("one", cls="Theirs"))
    world.distribution("acme-dp", {"one": "acme_d:Theirs"})
    things = world.registry
    assert things.names() == ["acme-dp/one", "one"]
    assert things.load("one").__name__ == "Some"
    theirs = things.load("acme-dp/one")
    assert theirs.__name__ == "Theirs"
    assert theirs.name == "acme-dp/one"
    assert things.load("one").name == "one"
    assert things.names() == ["acme-dp/one", "one"]


def test_two_distributions_with_one_name(world):
    world.connect()
    for letter in "pq":
        world.write(f"acme_{letter}.py", world.plain(cls=letter.upper()))
        world.distribution(f"acme-{letter}", {"same": f"acme_{letter}:{letter.upper()}"})
    assert world.registry.names() == ["acme-p/same", "acme-q/same"]
    assert world.registry.load("acme-q/same").__name__ == "Q"
    assert "did you mean" not in refusal(world.registry.load, "zzz", error=UnknownNameError)


def test_entry_points_that_break_name_their_distribution(world):
    world.connect()
    world.write("acme_e.py", "x = 1\nraise RuntimeError('two\\nlines')\n")
    world.write("acme_f.py", world.source("other-name"))
    world.distribution(
        "acme-dp",
        {
            "boom": "acme_e:Some",
            "gone": "acme_none:Some",
            "module": "acme_f",
            "renamed": "acme_f:Some",
        },
    )
    message = refusal(world.registry.load, "boom")
    assert "'acme-dp'" in message
    assert "acme_e.py, line 2: RuntimeError: two lines" in message
    message = refusal(world.registry.load, "gone")
    assert message.endswith("cannot be imported: ModuleNotFoundError: No module named 'acme_none'")
    assert "not a class" in refusal(world.registry.load, "module")
    assert "give both one name" in refusal(world.registry.load, "renamed")


# --- files and modules --------------------------------------------------------------------------


def test_decorated_class_from_a_file(world):
    world.connect()
    world.write("mine.py", world.source("mine", facts=", version=2"))
    cls = world.registry.load("./mine.py:Some")
    assert (cls.name, cls.version) == ("mine", 2)
    assert world.registry.load(f"{world.folder}/mine.py:Some") is cls
    assert world.registry.load("mine") is cls
    assert world.registry.entry("mine").origin == str(world.folder / "mine.py")
    assert pickle.loads(pickle.dumps(cls)) is cls
    assert sys.modules[cls.__module__].Some is cls


def test_an_edited_file_is_run_again(world):
    world.connect()
    world.write("edit.py", world.source("edit"))
    old = world.registry.load("edit.py:Some")
    world.write("edit.py", world.source("edit", facts=", version=2"))
    new = world.registry.load("edit.py:Some")
    assert new is not old
    assert new.version == 2
    assert fingerprint(new) != fingerprint(old)
    assert world.registry.load("edit") is new


def test_undecorated_class_from_a_file(world):
    world.write("bare.py", world.plain(cls="DPNoiseMask2D"))
    cls = world.registry.load("bare.py:DPNoiseMask2D")
    assert (cls.name, cls.version) == ("dp-noise-mask2-d", 1)
    world.write("own.py", world.plain(body=f"name = 'own'\nversion = 7\n{textwrap.dedent(BODY)}"))
    cls = world.registry.load("own.py:Some")
    assert (cls.name, cls.version) == ("own", 7)


def test_undecorated_class_does_not_inherit_a_name(world):
    world.connect()
    world.write("parent.py", world.source("parent"))
    world.write("child.py", world.plain(cls="Child", head="import parent", base="parent.Some"))
    cls = world.registry.load("child.py:Child")
    assert (cls.name, cls.version) == ("child", 1)


def test_undecorated_class_named_like_a_builtin(world):
    world.builtin("one.py", "one")
    world.write("bad.py", world.plain(cls="One"))
    message = refusal(world.registry.load, "bad.py:One")
    assert "name = 'my-one'" in message


def test_a_builtin_by_its_file_or_module(world):
    file = world.builtin("one.py", "one")
    world.connect()
    assert world.registry.load(f"{file}:Some").name == "one"
    assert world.registry.load(f"{world.package}.one:Some") is world.registry.load("one")


def test_class_of_a_module(world):
    world.write("plugs/__init__.py", "")
    world.write("plugs/own.py", world.plain(cls="Own"))
    assert world.registry.load("plugs.own:Own").name == "own"
    assert "ModuleNotFoundError" in refusal(world.registry.load, "plugs.absent:Own")
    assert "did you mean 'Own'" in refusal(world.registry.load, "plugs.own:Owm")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = 1\n\nraise ValueError('a\\nb')\n", "bad.py, line 3: ValueError: a b"),
        ("x = 1\ndef (:\n", "bad.py, line 2: SyntaxError: "),
        ("import sys\nsys.exit(3)\n", "bad.py, line 2: SystemExit: 3"),
        ("def f():\n    return {}['k']\nf()\n", "bad.py, line 2: KeyError: 'k'"),
        ("import json\n\njson.loads('{')\n", "bad.py, line 3: JSONDecodeError"),
        ("import absent_module_x\n", "bad.py, line 1: ModuleNotFoundError"),
        ("x = '\0'\n", "bad.py"),
    ],
)
def test_files_that_cannot_be_imported(world, text, words):
    world.write("bad.py", text)
    before = set(sys.modules)
    message = refusal(world.registry.load, "./bad.py:Some")
    assert message.startswith("cannot import ")
    assert words in message
    assert not [name for name in set(sys.modules) - before if name.startswith("mibench_plugin")]


def test_interrupts_pass(world):
    world.write("stop.py", "raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        world.registry.load("stop.py:Some")


def test_a_failed_import_registers_nothing(world):
    world.connect()
    world.write("half.py", world.source("half") + "raise ValueError\n")
    refusal(world.registry.load, "half.py:Some")
    assert "half" not in world.registry


def test_contract_of_loaded_classes(world):
    world.write(
        "many.py",
        world.plain(cls="Good")
        + "class Bare(Thing): pass\n"
        + "class Half(Thing):\n    def must(self): ...\n    def act(self): ...\n"
        + "class Alien: pass\n"
        + "value = 3\n",
    )
    load = world.registry.load
    message = refusal(load, "many.py:Goood")
    assert message == (
        "many.py has no class 'Goood'; did you mean 'Good'? There are: Alien, Bare, Good, Half"
    )
    assert refusal(load, "many.py:Bare").endswith("Bare lacks act, make, must")
    assert refusal(load, "many.py:Half").endswith("Half lacks make")
    assert f"Alien must derive from {world.top}.base:Thing" in refusal(load, "many.py:Alien")
    assert "not a class but of type int" in refusal(load, "many.py:value")
    assert "needs a class" in refusal(load, "many.py")
    assert "needs a class" in refusal(load, "many.py:")


@pytest.mark.parametrize(
    "spec", ["./absent.py:Some", "absent.py:Some", "sub/absent.py", "~/q.py:A"]
)
def test_files_that_are_not_there(world, spec):
    assert "there is no file" in refusal(world.registry.load, spec)


@pytest.mark.parametrize("spec", ["./absent:Some", "sub/absent:Some", "/absent"])
def test_paths_that_are_no_python_files(world, spec):
    assert "write ./file.py:Class" in refusal(world.registry.load, spec)


# --- fingerprints -------------------------------------------------------------------------------


def marks(world, *texts):
    found = []
    for text in texts:
        world.write("print.py", text)
        found.append(fingerprint(world.registry.load("print.py:Some")))
    return found


def test_fingerprint_is_of_code_alone(world):
    text = world.plain() + "def helper(a, b=1):\n    return a + b\n"
    one, *others = marks(
        world,
        text,
        "# a remark\n\n" + text,
        '"""Of the module."""\n' + text,
        text.replace("    return a + b", '    """Adds."""\n\n    return (a +\n        b)  # sum'),
        text.replace("    pass\n", '    """Of the class."""\n\n    pass\n    """Of nothing."""\n'),
    )
    assert len(one) == 16
    assert int(one, 16) >= 0
    assert others == [one] * 4


def test_fingerprint_changes_with_code(world):
    text = world.plain() + "def helper(a, b=1):\n    return a + b\n"
    found = marks(
        world,
        text,
        text.replace("b=1", "b=2"),
        text.replace("b=1", "b=1.0"),
        text.replace("b=1", "b=None"),
        text.replace("a + b", "a - b"),
        text.replace("a + b", "'a + b'"),
        text.replace("return a + b", "return"),
        text + "X = ()\n",
        text + "X = []\n",
    )
    assert len(set(found)) == len(found)


def test_fingerprint_is_of_the_code_that_runs(world):
    file = world.write("print.py", world.plain())
    cls = world.registry.load("print.py:Some")
    before = fingerprint(cls)
    file.write_text("x = 1\n")
    assert fingerprint(cls) == before


def test_fingerprint_of_other_classes():
    assert fingerprint(Registry) == fingerprint(Entry)
    assert fingerprint(Registry) != fingerprint(World)
    space: dict = {"__name__": "typed_at_a_prompt"}
    exec("class Typed: pass", space)
    with pytest.raises(PluginError, match="typed_at_a_prompt:Typed"):
        fingerprint(space["Typed"])
    with pytest.raises(PluginError, match="builtins:int"):
        fingerprint(int)


# --- the package's own --------------------------------------------------------------------------


def test_the_six_registries_list_without_torch():
    code = """
        import sys
        from mibench import registry
        names = ["defenses", "attacks", "datasets", "backbones", "metrics", "measures"]
        for name in names:
            each = getattr(registry, name)
            each.entries(), repr(each), len(each), "none" in each
        heavy = {"torch", "numpy", "torchvision", "timm", "pydantic"} & set(sys.modules)
        parts = [m for m in sys.modules if m.startswith("mibench.")]
        assert not heavy, heavy
        assert sorted(parts) == ["mibench.errors", "mibench.registry", "mibench.suggest"], parts
    """
    root = str(registry.__file__).rsplit("mibench", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_fingerprint_of_imported_helpers_changes_for_their_users_alone(tmp_path, monkeypatch):
    package = tmp_path / "helpers_apart"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "one.py").write_text("import helpers_apart.deep\nx = helpers_apart.deep.z\n")
    (package / "deep.py").write_text("z = 1\n")
    (package / "two.py").write_text("y = 2\n")
    for name in ("one", "two"):
        text = f"from helpers_apart import {name}\n\n\nclass User:\n    pass\n"
        (tmp_path / f"user_of_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    users = [importlib.import_module(f"user_of_{name}").User for name in ("one", "two")]

    def found():
        return [imported_fingerprint(user, "helpers_apart") for user in users]

    before = found()
    (package / "deep.py").write_text("z = 1  # a remark\n")
    assert found() == before
    (package / "deep.py").write_text("z = 3\n")
    after = found()
    assert after[0] != before[0]
    assert after[1] == before[1]
