"""Galleries as the pages show them: which part of which picture stands where."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pandas as pd

from mibench.board import words
from mibench.board.gallery import COMMON, CONTROL, FILE, ORIGINAL, WORST
from mibench.board.model import Gallery, Listed, Section
from mibench.gallery import FIRST_CHOICE
from mibench.outputs import PER_IMAGE, PERMUTED

HEADS = {ORIGINAL: "original", WORST: "worst of all", CONTROL: "control: permuted"}


@dataclass(frozen=True)
class Crop:
    """One image of a picture.

    Attributes:
        source: of the picture, from the folder of the board's version.
        x: of its left edge in the picture.
        y: of its upper edge.
        side: of the image.
        width: of the whole picture.
        height: of the whole picture.
        alt: what it shows.
        note: its score; empty where it is not known.
    """

    source: str
    x: int
    y: int
    side: int
    width: int
    height: int
    alt: str
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """The gallery of a row: headings, and per image a caption with its crops."""

    heads: tuple[str, ...]
    lines: tuple[tuple[str, tuple[Crop, ...]], ...]
    seed: int


@dataclass(frozen=True)
class Behind:
    """The same few images behind one defense; ``href`` is empty for the originals themselves."""

    label: str
    note: str
    href: str
    crops: tuple[Crop, ...]


def of_row(one: Listed, root: Path) -> Shown | None:
    """The gallery of a run; None where it has none."""
    gallery = one.entry.gallery
    if gallery is None:
        return None
    classes, scores = _told(one, root)
    lines = []
    for line, image in enumerate(gallery.images):
        caption = f"no. {image}" + (f", {classes[image]}" if image in classes else "")
        crops = [
            _crop(one, gallery, line, column, scores.get((name, image), ""))
            for column, name in enumerate(gallery.columns)
        ]
        lines.append((caption, tuple(crops)))
    heads = tuple(HEADS.get(name, name) for name in gallery.columns)
    return Shown(heads, tuple(lines), one.record.seed)


def strip(section: Section) -> tuple[Behind, ...]:
    """The first attacked images behind each defense of a section, in the order of its rows.

    Nobody chose them: they are the first of the protocol. Empty where only one row has them.
    """
    found: list[Behind] = []
    for row in section.rows:
        one = next((run for run in row.headline if run.entry.gallery is not None), None)
        gallery = one.entry.gallery if one else None
        if one is None or gallery is None or not {*range(COMMON)} <= {*gallery.images}:
            continue
        where = [gallery.images.index(image) for image in range(COMMON)]
        if not found:
            crops = [_crop(one, gallery, at, 0) for at in where]
            found.append(Behind("original", "", "", tuple(crops)))
        score = row.scores.get(FIRST_CHOICE)
        note = "" if score is None or score.value is None else f"SSIM {words.of(score)}"
        crops = [_crop(one, gallery, at, 1) for at in where]
        found.append(Behind(row.label, note, row.slug, tuple(crops)))
    return tuple(found) if len(found) > 2 else ()


def _crop(one: Listed, gallery: Gallery, line: int, column: int, note: str = "") -> Crop:
    side = gallery.side
    name, image = gallery.columns[column], gallery.images[line]
    return Crop(
        source=f"records/{quote(one.id, safe='')}/{FILE}",
        x=column * side,
        y=line * side,
        side=side,
        width=len(gallery.columns) * side,
        height=len(gallery.images) * side,
        alt=f"{HEADS.get(name, name)}, image {image}",
        note=note,
    )


def _told(one: Listed, root: Path) -> tuple[dict[int, str], dict[tuple[str, int], str]]:
    """Class of each image, and its SSIM by column of the gallery, as far as they are there."""
    gallery = one.entry.gallery
    path = root / "records" / one.id / PER_IMAGE
    if gallery is None or not path.is_file():
        return {}, {}
    table = pd.read_parquet(path).set_index("index")
    own = WORST if WORST in gallery.columns else one.record.attack.name
    columns = {own: FIRST_CHOICE, CONTROL: f"{PERMUTED}_{FIRST_CHOICE}"}
    columns |= {
        name: f"{name}_{FIRST_CHOICE}"
        for name in gallery.columns
        if name not in (ORIGINAL, own, CONTROL)
    }
    shown = [image for image in gallery.images if image in table.index]
    values = {name: table[name].to_dict() for name in columns.values() if name in table.columns}
    scores = {
        (name, image): words.number(values[column][image])
        for name, column in columns.items()
        if column in values
        for image in shown
    }
    named = "class" in table.columns and "label" in table.columns
    classes = {image: str(table.loc[image, "class"]) for image in shown} if named else {}
    return classes, scores
