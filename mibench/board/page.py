"""The static page of a board: an index, and a page for each row."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from markupsafe import Markup

from mibench.board import pictures, svg, view, words
from mibench.board.model import Board, Level, Listed, Row, Section
from mibench.errors import RecordError
from mibench.files import plain_name

INDEX = "index.html"
ROWS = "rows"
DATASETS = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "celeba": "CelebA",
    "imagenet1k": "ImageNet-1K", "procedural": "Generated images",
}  # fmt: skip
"""What datasets are called in headings."""
PLOTS = (("ssim", "SSIM"), ("reid-top1", "found"))
"""Metrics with a plot of their own."""
ASSETS = {
    "index.html": (("board.css", "style.css"), ("tips.js", "board.js")),
    "row.html": (("row.css", "style.css"), ("tips.js",)),
}
"""Styles and scripts that stand in each kind of page; what adapts to the screen comes last."""
BADGES = {
    Level.CLAIMED: "Its form is right, and its means follow from its values per image.",
    Level.RESCORED: "Its scores were computed again from its images, and its accuracy from its "
    "weights.",
    Level.REPRODUCED: "It was run again with another seed and came out the same within the noise "
    "floor.",
}
SIGNS = {Level.CLAIMED: "○", Level.RESCORED: "◐", Level.REPRODUCED: "●"}
"""Shapes beside the words, so that no badge is told by colour alone."""


def render(board: Board, root: Path) -> dict[str, bytes]:
    """Makes the pages.

    They lie in ``site/`` beside ``records/`` and link there for pictures, records and values per
    image, so what is published is the whole folder of the board's version.

    Args:
        board: what is shown.
        root: folder of the board's version, with ``records/``.

    Returns:
        Contents by path below ``site/``. The same board and files give the same bytes.

    Raises:
        RecordError: two rows have one slug, or a slug is no plain name of a file.
    """
    rows = [row for section in board.sections for row in section.rows]
    _check_slugs(rows)
    templates = _environment()
    known = view.successors(board)
    shared = {"board": board, "words": words, "view": view, "signs": SIGNS, "badges": BADGES}
    found = {
        INDEX: _page(
            templates,
            INDEX,
            shared,
            title=f"mibench leaderboard {board.version}",
            up="",
            sections=[_section(section, known) for section in board.sections],
            columns=view.COLUMNS,
            groups=view.groups(),
            filters=_filters(board),
        )
    }
    for section in board.sections:
        for row in section.rows:
            found[f"{ROWS}/{row.slug}.html"] = _page(
                templates,
                "row.html",
                shared,
                title=f"{row.label}, {section.protocol.id} · mibench leaderboard",
                up="../",
                **_row(board, section, row, root, known),
            )
    return found


def _check_slugs(rows: list[Row]) -> None:
    seen: set[str] = set()
    for row in rows:
        if plain_name(row.slug) != row.slug:
            raise RecordError(f"the row {row.label!r} cannot have a page called {row.slug!r}")
        if row.slug in seen:
            raise RecordError(f"two rows of the board have the page {row.slug}.html")
        seen.add(row.slug)


@cache
def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("mibench.board"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_upright,
    )
    made.filters["lead"] = words.address
    made.filters["named"] = lambda metric: view.NAMES.get(metric, metric)
    made.filters["coordinate"] = svg.coordinate
    made.filters["url"] = lambda text: quote(text, safe="")
    return made


def _upright(value: object) -> object:
    """Text without what turns its direction: an author's name must not turn the words around it."""
    return value.translate(_TURNING) if type(value) is str else value


_TURNING = dict.fromkeys([*range(0x202A, 0x202F), *range(0x2066, 0x206A)])


def _page(templates: jinja2.Environment, name: str, shared: dict[str, Any], **parts: Any) -> bytes:
    style, script = (Markup("").join(map(_asset, names)) for names in ASSETS[name])
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src 'sha256-{_digest(style)}'",
            f"script-src 'sha256-{_digest(script)}'",
            "img-src 'self' data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    text = templates.get_template(name).render(
        **shared, **parts, policy=policy, style=style, script=script
    )
    return text.encode()


@cache
def _asset(name: str) -> Markup:
    """A file of this package, which stands in every page as it is."""
    text = (resources.files("mibench.board") / "templates" / name).read_text("utf-8")
    return Markup(text)  # noqa: S704


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- the index -----------------------------------------------------------------------------------


def _section(section: Section, known: dict[str, Row]) -> dict[str, Any]:
    ranked = [row for row in section.rows if row.ranked]
    values = section.protocol.values
    drawn = [svg.tradeoff(section, metric, named) for metric, named in PLOTS]
    return {
        "anchor": f"{plain_name(section.protocol.id)}-{section.protocol.content}",
        "called": DATASETS.get(section.dataset, section.dataset),
        "section": section,
        "facts": _facts(section),
        "ranked": [_shown(row, known) for row in ranked],
        "others": [_shown(row, known) for row in section.rows if not row.ranked],
        "plots": [plot for plot in drawn if plot is not None],
        "sizes": _sizes(),
        "floor": [_floor(section, column.key) for column in view.COLUMNS],
        "budget": values.get("max_client_flops"),
        "strip": pictures.strip(section),
    }


def _sizes() -> list[tuple[float, str]]:
    more = {svg.SIZES[-1]: " or more"}
    return [(round(svg.UNIT * n**0.5, 1), f"{n}×{more.get(n, '')}") for n in svg.SIZES]


def _floor(section: Section, key: str) -> view.Cell | None:
    """The blind guess in the columns of scores; None in the others."""
    share = key.removeprefix("leak-")
    metric = {"reid": "reid-top1"}.get(share, share)
    score = section.floor.get(metric)
    if share != key and score is not None:
        return view.Cell("0")
    return None if score is None else view.score_cell(score)


def _facts(section: Section) -> list[tuple[str, str]]:
    """What the protocol fixes, in a few words."""
    values = section.protocol.values
    told = [("protocol", f"{section.protocol.id} ({section.protocol.content})")]
    told += [("track", section.protocol.track), ("backbone", section.backbone)]
    adversary = values.get("adversary")
    if isinstance(adversary, dict):
        told.append(("adversary", words.setting(adversary)))
    if section.rows:
        images = section.rows[0].headline[0].record.data
        if images is not None and "attacked" in images.images:
            told.append(("attacked images", words.number(images.images["attacked"], 0)))
    attacks = values.get("attacks")
    if isinstance(attacks, dict) and attacks:
        told.append(("attacks", ", ".join(sorted(attacks))))
    budget = values.get("max_client_flops")
    if isinstance(budget, int):
        told.append(("client budget", words.flops(budget)))
    if section.noise_attack:
        told.append(("noise curve", f"measured by {section.noise_attack}"))
    return told


def _shown(row: Row, known: dict[str, Row]) -> dict[str, Any]:
    """A line of the table."""
    return {
        "row": row,
        "cells": [(column, column.cell(row)) for column in view.COLUMNS],
        "adversary": view.adversary(row),
        "remarks": _remarks(row),
        "successor": known.get(row.superseded_by or ""),
        "text": " ".join((row.label, row.attack, row.level, *_credits(row))).lower(),
    }


def _remarks(row: Row) -> list[str]:
    """The reasons that are not told with a link already."""
    told = [f"Advisory {one.id}:" for one in row.advisories] + [f"Record {row.superseded_by} "]
    return [reason for reason in row.reasons if not reason.startswith(tuple(told))]


def _credits(row: Row) -> list[str]:
    origin = row.headline[0].entry.origin
    return [part for part in (origin.title, origin.submission, *origin.authors) if part]


def _filters(board: Board) -> list[tuple[str, str, Sequence[str]]]:
    """Key, name and choices of each filter."""
    rows = [row for section in board.sections for row in section.rows]
    return [
        ("dataset", "Dataset", view.distinct(one.dataset for one in board.sections)),
        ("backbone", "Backbone", view.distinct(one.backbone for one in board.sections)),
        ("protocol", "Protocol", view.distinct(one.protocol.id for one in board.sections)),
        ("adversary", "Adversary", view.distinct(view.adversary(row) for row in rows)),
        ("attack", "Attack", view.distinct(row.attack for row in rows)),
        ("badge", "Badge", [level for level in Level if any(row.level == level for row in rows)]),
    ]


# --- a row ---------------------------------------------------------------------------------------


def _row(
    board: Board, section: Section, row: Row, root: Path, known: dict[str, Row]
) -> dict[str, Any]:
    first = row.headline[0]
    record = first.record
    drawn = next((one for one in row.headline if one.entry.gallery is not None), first)
    over = [svg.coalitions(one.record, "ssim", "SSIM") for one in (*row.headline, *row.others)]
    sizes = svg.by_size(view.same_defense(board, row), "ssim", "SSIM")
    return {
        "section": section,
        "called": DATASETS.get(section.dataset, section.dataset),
        "row": row,
        "first": first,
        "record": record,
        "cells": {column.key: column.cell(row) for column in view.COLUMNS},
        "adversary": view.adversary(row),
        "successor": known.get(row.superseded_by or ""),
        "gallery": pictures.of_row(drawn, root),
        "gallery_reason": drawn.entry.gallery_reason or "no picture was made",
        "coalitions": [plot for plot in [*over, sizes] if plot is not None],
        "runs": [_run(one, board.version) for one in row.headline],
        "others": [_run(one, board.version) for one in row.others],
    }


def _run(one: Listed, version: str) -> dict[str, Any]:
    return {
        "one": one,
        "commands": view.commands(one, version),
        "files": sorted(one.record.files.items()),
        "place": f"records/{quote(one.id, safe='')}/",
    }
