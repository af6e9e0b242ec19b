"""The documentation is executed: its code runs, its commands parse, its links lead somewhere."""

import ast
import functools
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from mibench.artifacts import ArtifactStore
from mibench.evaluate import Job, evaluate
from mibench.params import parse_assignments
from mibench.protocol import load_protocol
from mibench.registry import defenses

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")

TINY = """
id: docs-v1
track: test
title: as small as a run can be
data:
  dataset: procedural
  image_size: 32
  train: {split: stream, start: 0, count: 256}
  auxiliary: {split: stream, start: 1000000, count: 256}
  validation: {split: stream, start: 3000000, count: 32}
  private: {split: stream, start: 2000000, count: 64}
  attacked: 4
backbone: {name: small-resnet, params: {stem: 8, width: 8}, split_point: stem}
recipe: {steps: 5, batch: 16}
attacks: {decoder: {steps: 5, batch: 16}}
metrics: {mse: 1, psnr: 1, ssim: 1}
"""


@dataclass(frozen=True)
class Component:
    """A defense or attack that a page shows whole."""

    page: str
    kind: str
    name: str
    code: str


@dataclass(frozen=True)
class Command:
    """A line that begins with ``mibench``, split as a shell would split it."""

    page: str
    words: tuple[str, ...]

    def __str__(self):
        return f"{self.page}: {' '.join(self.words)}"

    def values(self, option):
        return [b for a, b in zip(self.words, self.words[1:], strict=False) if a == option]


def blocks(language):
    for page in PAGES:
        for found, code in FENCE.findall(page.read_text(encoding="utf-8")):
            if found == language:
                yield page.relative_to(ROOT).as_posix(), code


def components():
    for page, code in blocks("python"):
        for node in ast.parse(code).body:
            bases = [b.id for b in node.bases if isinstance(b, ast.Name)] if is_class(node) else []
            for kind in ("Defense", "Attack"):
                if kind in bases:
                    yield Component(page, kind.lower(), node.name, code)


def is_class(node):
    return isinstance(node, ast.ClassDef)


def commands():
    for page, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = tuple(shlex.split(line, comments=True))
            if words[:1] == ("mibench",):
                yield Command(page, words)


COMPONENTS = list(components())
COMMANDS = list(commands())


@pytest.fixture(scope="module")
def protocol(tmp_path_factory):
    path = tmp_path_factory.mktemp("protocol") / "tiny.yaml"
    path.write_text(TINY, encoding="utf-8")
    return load_protocol(str(path))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return ArtifactStore(tmp_path_factory.mktemp("cache"))


def written(component, folder):
    """Writes the code as a reader would and returns the name to run it by."""
    path = folder / "component.py"
    path.write_text(component.code, encoding="utf-8")
    return f"{path}:{component.name}"


@functools.cache
def command_line():
    """The command line as a tree of commands and options."""
    app = getattr(pytest.importorskip("mibench.cli"), "app", None)
    if app is None:
        pytest.skip("mibench.cli has no app yet")
    import typer.main

    return typer.main.get_command(app)


def test_pages_show_what_they_promise():
    assert {c.kind for c in COMPONENTS if c.page == "README.md"} == {"defense", "attack"}
    assert {c.page for c in COMPONENTS} >= {"docs/add-a-defense.md", "docs/add-an-attack.md"}
    assert COMMANDS


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda c: f"{c.page}-{c.name}")
def test_components_run_through_the_whole_benchmark(component, tmp_path, protocol, store):
    name = written(component, tmp_path)
    defense, attack = (name, "decoder") if component.kind == "defense" else ("none", name)
    result = evaluate(Job(protocol, defense, attack, {}, {}), store, None, "cpu")
    assert result.record.status == "success"
    assert all(score.value is not None for score in result.record.scores)
    assert result.reconstructions.shape == (4, 3, 32, 32)


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda c: f"{c.page}-{c.name}")
def test_components_are_short(component):
    limit = 20 if component.page == "README.md" else 30
    assert len(component.code.splitlines()) < limit


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda c: f"{c.page}-{c.name}")
def test_every_learned_parameter_of_a_shown_defense_moves(component, tmp_path, protocol):
    if component.kind != "defense":
        pytest.skip("an attack")
    import torch

    from mibench.artifacts import Checkpoint
    from mibench.backbones.base import BackboneSpec
    from mibench.data.roles import load_roles
    from mibench.task import Classification

    ten = Classification(tuple("0123456789"))
    method = defenses.load(written(component, tmp_path))
    split = BackboneSpec("small-resnet", protocol.backbone.params, "stem").build(
        (3, 32, 32), ten, 0
    )
    defense = method(split, method.Params())
    before = {name: value.detach().clone() for name, value in defense.named_parameters()}
    train = load_roles(protocol.data, None, tmp_path).train
    defense.fit(train, protocol.recipe, 0, Checkpoint(tmp_path / "checkpoint"))
    still = [n for n, value in defense.named_parameters() if torch.equal(value, before[n])]
    assert not still


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_commands_and_options_exist(command):
    tree = command_line()
    words = list(command.words[1:])
    place = tree
    while words and not words[0].startswith("-") and hasattr(place, "commands"):
        assert words[0] in place.commands, f"no command {words[0]!r}"
        place = place.commands[words.pop(0)]
    known = {option for param in place.params for option in (*param.opts, *param.secondary_opts)}
    used = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert used <= known | {"--help"}


def shown_file(command, kind, folder):
    """Writes the component that a command names by file, which its page must show."""
    for name in command.values(f"--{kind}"):
        file, _, class_name = name.rpartition(":")
        if file:
            shown = [c for c in COMPONENTS if (c.page, c.name) == (command.page, class_name)]
            assert shown, f"{command.page} does not show {class_name}"
            assert f"`{file.removeprefix('./')}`" in (ROOT / command.page).read_text("utf-8")
            (folder / file).write_text(shown[0].code, encoding="utf-8")


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_names_and_parameters_in_commands_exist(command, tmp_path, monkeypatch):
    from mibench.cli.prior import prior_params
    from mibench.cli.run import SMOKE, _check_names
    from mibench.evaluate import open_record

    monkeypatch.chdir(tmp_path)
    for kind in ("defense", "attack"):
        shown_file(command, kind, tmp_path)
    assignments, (name, *_) = command.values("--set"), [*command.values("--protocol"), SMOKE]
    if command.words[1:2] == ("run",) and "--help" not in command.words:
        (defense,), (attack,) = command.values("--defense"), command.values("--attack")
        # What the command itself checks before it asks for images.
        protocol, given = _check_names(name, defense, attack, assignments)
        job = Job(protocol, defense, attack, given.get("defense", {}), given.get("attack", {}))
        assert open_record(job, "cpu").status == "started"
    elif command.words[1:2] == ("prior",):
        given = parse_assignments(assignments, ("prior",))
        assert prior_params(load_protocol(name), given.get("prior", {}))
    else:
        load_protocol(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    missing = set()
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path = target.partition("#")[0]
        if path and not re.match(r"[a-z][a-z0-9+.-]*:", path):
            there = (page.parent / path).resolve()
            if not there.exists():
                missing.add(there)
    assert not missing


def project_files():
    """Files that git knows or would add; without git, the files of an unpacked archive."""
    asked = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(asked, check=True, capture_output=True).stdout.decode()
    except (OSError, subprocess.CalledProcessError):
        return [path for part in ("mibench", "tests", "docs") for path in (ROOT / part).rglob("*")]
    return [ROOT / name for name in listed.split("\0") if name]


def test_no_file_names_a_private_path_or_a_registry_host():
    folders = "|".join(("work", "root"))
    hosts = ("pypi.", "pythonhosted.", "anaconda.", "npmjs.", "crates.")
    forbidden = re.compile(rf"(?<![\w.)}}])/(?:{folders})/|" + "|".join(map(re.escape, hosts)))
    found = []
    for path in project_files():
        if path.suffix in {".png", ".parquet", ".pyc"} or not path.is_file():
            continue
        if path == Path(__file__).resolve():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path}:{n}" for n, line in enumerate(lines, 1) if forbidden.search(line)]
    assert not found
