"""The part of docs/protocols.md that is generated: ``python -m mibench.cli.protocols_page``."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from pathlib import Path

from mibench.cli.protocol_text import COLUMNS, example, flow, row, standing
from mibench.cli.run import ATTACKERS_IMAGES
from mibench.protocol import ROLES, Protocol, RoleRule, load_protocol, released

PAGE = Path(__file__).parents[2] / "docs" / "protocols.md"
COMMAND = "python -m mibench.cli.protocols_page"
BEGIN = f"<!-- From here on generated: {COMMAND} -->\n"
WIDTH = 100


def page(text: str, protocols: Iterable[Protocol]) -> str:
    """Returns the page with its generated part made anew.

    Args:
        text: the page as it is.
        protocols: what to describe, in this order.

    Raises:
        ValueError: the page has no line that says where the generated part begins.
    """
    written, found, _ = text.partition(BEGIN)
    if not found:
        raise ValueError(f"{PAGE.name} has no line {BEGIN.strip()!r}")
    return "\n".join([f"{written}{BEGIN}", *_generated(list(protocols))])


def _generated(protocols: list[Protocol]) -> Iterable[str]:
    yield "## All released protocols\n"
    yield (
        "Minutes are those of a defense and one attack on two CPU cores, where somebody measured "
        "them.\n"
    )
    yield _cells(COLUMNS)
    yield _cells(["---"] * len(COLUMNS))
    for protocol in protocols:
        yield _cells(row(protocol))
    yield ""
    for protocol in protocols:
        yield from _block(protocol)


def _cells(values: Iterable[str]) -> str:
    return f"| {' | '.join(values)} |"


def _block(protocol: Protocol) -> Iterable[str]:
    data, rule = protocol.data, protocol.adversary
    yield f"### {protocol.id}\n"
    yield textwrap.fill(protocol.title[:1].upper() + protocol.title[1:] + ".", WIDTH) + "\n"
    yield _item("Standing", f"track {protocol.track}, {standing(protocol)}")
    yield _item("Content id", f"`{protocol.content_id}`")
    yield _item("Data", f"{data.dataset} at {data.image_size} pixels")
    for name in ROLES:
        attacked = f"; the first {data.attacked} are attacked" if name == "private" else ""
        yield _item(f"Role `{name}`", _role(getattr(data, name)) + attacked)
    backbone = protocol.backbone
    params = f" `{flow(backbone.params)}`" if backbone.params else ""
    yield _item("Network", f"`{backbone.name}`{params}, cut behind `{backbone.split_point}`")
    yield _item("Recipe", f"`{flow(protocol.recipe.model_dump(mode='json'))}`")
    sent = "once" if rule.transmissions == 1 else f"{rule.transmissions} times"
    servers = f"{rule.coalition} server{'s'[: rule.coalition > 1]}"
    yield _item(
        "Adversary",
        f"`{rule.knowledge}`, reads {servers}, {ATTACKERS_IMAGES[rule.auxiliary]}, "
        f"sees each image sent {sent}",
    )
    for name, values in protocol.attacks.items():
        yield _item(f"Attack `{name}`", f"`{flow(values)}`")
    budget = protocol.max_client_flops
    yield _item("Client", f"at most {budget:,} FLOPs per image" if budget else "no budget")
    scores = ", ".join(f"{name} (version {n})" for name, n in protocol.metrics.items())
    yield _item("Scores", scores)
    judge = protocol.judge
    yield _item("Judge", f"`{flow(judge.model_dump(mode='json'))}`" if judge else "nobody")
    yield _item(
        "Seeds",
        f"{', '.join(map(str, protocol.seeds))}; batches of {protocol.batch} when attacking, "
        f"{protocol.threads} CPU thread{'s'[: protocol.threads > 1]}",
    )
    yield f"\n```sh\n{example(protocol, protocol.id)}\n```\n"


def _item(name: str, text: str) -> str:
    return textwrap.fill(
        f"- {name}: {text}",
        WIDTH,
        subsequent_indent="  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _role(rule: RoleRule) -> str:
    where = f"split `{rule.split}`" + (f" of {rule.dataset}" if rule.dataset else "")
    if rule.hashed is not None:
        most = f", at most {rule.count:,}" if rule.count else ""
        return f"{where}, all whose hash lies in [{rule.hashed[0]}, {rule.hashed[1]}){most}"
    assert rule.count is not None, "a rule without hashes has a count"
    return f"{rule.count:,} of {where} ({rule.start:,} to {rule.start + rule.count - 1:,})"


def main() -> None:
    """Writes the page."""
    protocols = map(load_protocol, released())
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), protocols), encoding="utf-8")


if __name__ == "__main__":
    main()
