"""Requests that components of every kind answer, in their own process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mibench import registry
from mibench.checks.host import Answer, State, Tensors, handles
from mibench.errors import PluginError
from mibench.params import build

REGISTRIES: dict[str, registry.Registry[Any]] = {
    "defense": registry.defenses,
    "attack": registry.attacks,
    "dataset": registry.datasets,
    "backbone": registry.backbones,
    "metric": registry.metrics,
}


@handles("component.find")
def find(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Tells of which kind the classes of a file are: ``place``, ``classes``.

    Answers:
        ``found``: pairs of kind and class, for the classes that are a component of some kind.

    Raises:
        PluginError: the place cannot be imported, or no class is a whole component.
    """
    found: list[list[str]] = []
    why = "it has no classes"
    for name in header["classes"]:
        for kind, where in REGISTRIES.items():
            try:
                where.load(f"{header['place']}:{name}")
            except PluginError as error:
                if "must derive from" not in str(error):
                    why = str(error)
                continue
            found.append([kind, name])
    if not found:
        raise PluginError(f"{header['place']} holds no component: {why}")
    return {"found": found}, {}


@handles("component.code")
def code(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Tells the hash that a record gives of a component's code: ``kind``, ``name``, ``params``.

    Answers:
        ``code``.
    """
    # Takes seconds to import, and few need it.
    from mibench.evaluate import component_of

    found: Any = REGISTRIES[header["kind"]].load(header["name"])
    return {"code": component_of(found, header["name"], header.get("params") or {}).code}, {}


@handles("component.load")
def load(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Imports a component: ``kind``, ``name`` (or ``file.py:Class``) and its ``params``.

    Leaves the class in ``state.parts["class"]`` and, where the kind has parameters, an instance of
    them in ``state.parts["params"]``.

    Answers:
        ``name``, ``version``, all ``params``, ``builtin``, and the methods and attributes that it
        overrides of its kind's base class (``overrides``).

    Raises:
        MibenchError: there is no such component, or it is not complete, or a parameter is wrong.
    """
    where = REGISTRIES[header["kind"]]
    found: Any = where.load(header["name"])
    state.parts["class"] = found
    params: dict[str, Any] = {}
    if hasattr(found, "Params"):
        given = build(found.Params, header.get("params") or {}, f"{where.kind} {found.name}")
        state.parts["params"] = given
        params = given.model_dump(mode="json")
    base = where.base
    own = [one for one in found.__mro__ if one not in base.__mro__]
    names = {
        name
        for one in own
        for name in vars(one)
        if hasattr(base, name) and name != "_abc_impl" and not name.startswith("__")
    }
    facts: dict[str, Any] = {
        "name": found.name,
        "version": found.version,
        "params": params,
        "builtin": found.__module__.startswith("mibench."),
        "overrides": sorted(names),
    }
    return facts, {}
