"""Pins of the lowest versions follow from pyproject.toml."""

import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pins = runpy.run_path(str(ROOT / ".ci" / "pins.py"))["pins"]


def project(*dependencies, dev=()):
    return (
        f"[project]\ndependencies = {list(dependencies)}\noptional-dependencies.dev = {list(dev)}"
    )


def test_the_lower_bound_is_the_pin():
    text = project("torch>=2.6,!=2.13.0", "a.b_c-d >= 1", "x<3,>=2.1", "e[extra]>=4", dev=["t>=1"])
    assert pins(text) == ["torch==2.6", "a.b_c-d==1", "x==2.1", "e==4", "t==1"]


def test_a_requirement_without_a_lower_bound_is_refused():
    with pytest.raises(ValueError, match=r"'numpy' in pyproject\.toml has no lower bound"):
        pins(project("numpy"))
    with pytest.raises(ValueError, match="numpy<3"):
        pins(project("numpy<3"))
    assert pins(project("a>=1", dev=["stubs"])) == ["a==1"]


def test_every_requirement_of_the_package_is_pinned():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    told = tomllib.loads(text)["project"]
    assert len(pins(text)) >= len(told["dependencies"])
    assert all(one.count("==") == 1 for one in pins(text))
