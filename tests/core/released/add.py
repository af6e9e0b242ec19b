"""Writes down what new released protocols fix, here and in docs/protocols.md.

    python tests/core/released/add.py

A golden file that is there is never overwritten: a released protocol does not change.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from mibench.cli import protocols_page
from mibench.cli.protocol_text import differences
from mibench.errors import InvalidParamsError
from mibench.files import Json, pretty_json
from mibench.params import build
from mibench.protocol import Protocol, load_protocol, released
from mibench.registry import attacks, backbones

FOLDER = Path(__file__).parent


def golden(protocol: Protocol) -> dict[str, Json]:
    """What a golden file holds: the content id, and all values with their defaults."""
    return {
        "content": protocol.content_id,
        "values": protocol.recorded(),
        "components": components(protocol),
    }


def components(protocol: Protocol) -> dict[str, Json]:
    """Versions of a protocol's methods, and their parameters with the methods' own defaults.

    A default that changes in an attack would change the protocols that leave it out.
    """
    chosen = {
        f"attack {name}": (attacks, name, params) for name, params in protocol.attacks.items()
    }
    backbone = protocol.backbone
    chosen[f"backbone {backbone.name}"] = (backbones, backbone.name, backbone.params)
    found: dict[str, Json] = {}
    for owner, (registry, name, params) in chosen.items():
        method = registry.load(name)
        values = build(method.Params, params, owner).model_dump(mode="json")
        found[owner] = {"version": method.version, "params": values}
    return found


def changes(kept: Mapping[str, Json], protocol: Protocol) -> list[str]:
    """Names what a protocol fixes otherwise than its golden file says.

    A key that the file lacks, since it is younger, may be there with its default and only with it.
    """
    try:
        then = build(Protocol, {**kept["values"], "title": protocol.title}, protocol.id)
    except InvalidParamsError as error:
        return [str(error)]
    found = [
        f"{key} was {was}, is {now}"
        for key, was, now in differences(then.described(), protocol.described())
    ]
    now = components(protocol)
    for owner, was in kept["components"].items():
        if was["version"] != now[owner]["version"]:
            found.append(f"{owner} was version {was['version']}, is {now[owner]['version']}")
        # Parameters that are younger than the golden file are judged by the method's version.
        for key, value in flat(was["params"]):
            present = dict(flat(now[owner]["params"])).get(key)
            if present != value:
                found.append(f"{owner}: {key} was {value}, is {present}")
    if kept["content"] != protocol.content_id:
        found.append(f"content id was {kept['content']}, is {protocol.content_id}")
    return found


def flat(values: Mapping[str, Json], above: str = "") -> list[tuple[str, Json]]:
    """Returns nested values by dotted key."""
    pairs = []
    for key, value in values.items():
        inside = isinstance(value, Mapping) and value
        pairs += flat(value, f"{above}{key}.") if inside else [(f"{above}{key}", value)]
    return pairs


def refusal(name: str, found: list[str]) -> str:
    """The words for a released protocol that is not what it was."""
    version = re.search(r"(\d+)$", name)
    successor = name[: version.start()] + str(int(version[1]) + 1) if version else f"{name}-v2"
    return f"protocol {name} changed ({'; '.join(found)}); release {successor} instead"


def add(folder: Path, page: Path) -> list[str]:
    """Writes the golden files that are missing, and the page; returns the ids that are new.

    Raises:
        SystemExit: a protocol differs from its golden file; nothing is written then.
    """
    protocols = [load_protocol(name) for name in released()]
    new = []
    for protocol in protocols:
        file = folder / f"{protocol.id}.json"
        if not file.exists():
            new.append(protocol)
        elif found := changes(json.loads(file.read_text(encoding="utf-8")), protocol):
            sys.exit(refusal(protocol.id, found))
    for protocol in new:
        with (folder / f"{protocol.id}.json").open("xb") as file:
            file.write(pretty_json(golden(protocol)))
    text = protocols_page.page(page.read_text(encoding="utf-8"), protocols)
    page.write_text(text, encoding="utf-8")
    return [protocol.id for protocol in new]


if __name__ == "__main__":
    names = add(FOLDER, protocols_page.PAGE)
    sys.stdout.write(f"added: {', '.join(names) or 'nothing, all are there'}\n")
