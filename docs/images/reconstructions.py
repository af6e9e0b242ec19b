"""Draws the README's picture of reconstructions from the galleries of the leaderboard.

python docs/images/reconstructions.py leaderboard/v1 cifar10-lite-v1 none noise privdfs
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mibench.board.gallery import COMMON, FILE, ORIGINAL, WORST
from mibench.board.model import Row
from mibench.board.rows import assemble

SCALE = 3
GAP = 6
HEAD = 34
"""Height of the words above a column, pixels."""


def column(root: Path, row: Row, name: str) -> list[Image.Image]:
    """The first attacked images as one column of a row's gallery has them, enlarged."""
    listed = row.headline[0]
    gallery = listed.entry.gallery
    assert gallery is not None, f"{row.label} has no gallery"
    with Image.open(root / "records" / listed.id / FILE) as picture:
        whole = picture.convert("RGB")
    side, at = gallery.side, gallery.columns.index(name)
    found = []
    for image in range(COMMON):
        line = gallery.images.index(image)
        place = (at * side, line * side, (at + 1) * side, (line + 1) * side)
        size = (side * SCALE, side * SCALE)
        found.append(whole.crop(place).resize(size, Image.Resampling.NEAREST))
    return found


def draw(root: Path, protocol: str, defenses: list[str]) -> Image.Image:
    """Originals, and behind each defense the worst reconstruction that was made of them."""
    section = next(one for one in assemble(root).sections if one.protocol.id == protocol)
    rows = {row.label: row for row in reversed(section.rows)}
    columns = [("original", "", column(root, rows[defenses[0]], ORIGINAL))]
    for label in defenses:
        row = rows[label]
        name = WORST if WORST in row.headline[0].entry.gallery.columns else row.attack  # type: ignore[union-attr]
        told = f"SSIM {row.scores['ssim'].value:.2f}, found {row.scores['reid-top1'].value:.2f}"
        columns.append((f"{label}  {100 * row.accuracy:.0f} %", told, column(root, row, name)))
    side = columns[0][2][0].width
    wide = side + GAP
    sheet = Image.new(
        "RGB", (wide * len(columns) - GAP, HEAD + COMMON * wide - GAP), (255, 255, 255)
    )
    pen = ImageDraw.Draw(sheet)
    bold, plain = ImageFont.load_default(11), ImageFont.load_default(9)
    for at, (head, told, images) in enumerate(columns):
        pen.text((at * wide, 2), head, fill=(0, 0, 0), font=bold)
        pen.text((at * wide, 17), told, fill=(90, 90, 90), font=plain)
        for line, image in enumerate(images):
            sheet.paste(image, (at * wide, HEAD + line * wide))
    return sheet


if __name__ == "__main__":
    target = Path(__file__).with_suffix(".png")
    draw(Path(sys.argv[1]), sys.argv[2], sys.argv[3:]).save(target, optimize=True)
