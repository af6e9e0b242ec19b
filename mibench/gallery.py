"""A grid of originals, reconstructions and controls to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mibench.record import Score

MOST = 16
"""Images shown at most."""
PER_PANEL = 8
"""Rows of one panel; more go into a second one beside it."""
SIDE = 96
"""Least side of a shown image in pixels: a smaller one is enlarged by a whole factor."""

COLUMNS = ("original", "reconstruction", "control: permuted")
_GAP, _MARGIN, _CAPTION, _HEAD, _TITLE = 10, 20, 20, 24, 52
_INK, _PALE, _PAPER = (25, 25, 30), (105, 105, 115), (255, 255, 255)
FIRST_CHOICE = "ssim"
"""The metric that images are sorted and chosen by, where it was computed."""


def draw(
    *,
    originals: Sequence[np.ndarray],
    reconstructions: Sequence[np.ndarray],
    permuted: Sequence[np.ndarray],
    labels: Sequence[str],
    per_image: Mapping[str, Sequence[float]],
    scores: Sequence[Score],
    title: str,
) -> Image.Image:
    """Draws the images that leaked most, the worst first.

    Args:
        originals: uint8 (H, W, 3) each.
        reconstructions: what the attack made of them.
        permuted: what it made of another image's shares.
        labels: class names.
        per_image: values by metric; those of the control have the prefix ``permuted_``.
        scores: the metrics with their directions, in the order of the tables.
        title: what is shown, such as the names of defense and attack.
    """
    order, sorted_by = ranking(per_image, scores, len(originals))
    shown = order[:MOST]
    factor = max(1, round(SIDE / originals[0].shape[0]))
    side = originals[0].shape[0] * factor
    panels = -(-len(shown) // PER_PANEL)
    rows = min(len(shown), PER_PANEL)
    cell = max(side, 112)
    panel = len(COLUMNS) * cell + (len(COLUMNS) - 1) * _GAP
    width = 2 * _MARGIN + panels * panel + (panels - 1) * 2 * _MARGIN
    height = _TITLE + _HEAD + rows * (side + _CAPTION + _GAP) + _MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, 12), title, fill=_INK, font=_font(16))
    what = f"the {len(shown)} most leaked of {len(originals)} images by {sorted_by}, worst first"
    pen.text((_MARGIN, 33), what, fill=_PALE, font=_font(12))

    for place, index in enumerate(shown):
        number, row = divmod(place, PER_PANEL)
        left = _MARGIN + number * (panel + 2 * _MARGIN)
        top = _TITLE + _HEAD + row * (side + _CAPTION + _GAP)
        captions = (
            f"#{index} {labels[index]}",
            _figures(per_image, scores, "", index),
            _figures(per_image, scores, "permuted_", index),
        )
        pictures = (originals[index], reconstructions[index], permuted[index])
        for column, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            at = left + column * (cell + _GAP)
            if row == 0:
                pen.text((at, _TITLE + 4), COLUMNS[column], fill=_INK, font=_font(12))
            large = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(large, (at, top))
            below = _shortened(caption, pen, cell)
            pen.text((at, top + side + 3), below, fill=_PALE, font=_font(11))
    return sheet


def ranking(
    per_image: Mapping[str, Sequence[float]], scores: Sequence[Score], count: int
) -> tuple[list[int], str]:
    """Returns the images' indices, most leaked first, and the metric that decides.

    SSIM decides where it was computed, else the first metric that was.
    """
    known = [score for score in scores if score.metric in per_image]
    known.sort(key=lambda score: score.metric != FIRST_CHOICE)
    if not known:
        return list(range(count)), "index"
    first = known[0]
    sign = -1 if first.higher_is_better else 1
    values = per_image[first.metric]
    return sorted(range(count), key=lambda index: sign * values[index]), first.metric.upper()


def _figures(
    per_image: Mapping[str, Sequence[float]], scores: Sequence[Score], prefix: str, index: int
) -> str:
    """PSNR and SSIM of one image, where they were computed; else the first metric."""
    words = []
    for name, pattern in (("psnr", "{:.1f} dB"), ("ssim", "SSIM {:.2f}")):
        if f"{prefix}{name}" in per_image:
            words.append(pattern.format(per_image[f"{prefix}{name}"][index]))
    if not words:
        for score in scores:
            if f"{prefix}{score.metric}" in per_image:
                value = per_image[f"{prefix}{score.metric}"][index]
                return f"{score.metric} {value:.3f}"
    return ", ".join(words)


def _shortened(caption: str, pen: ImageDraw.ImageDraw, width: int) -> str:
    """Cuts a caption that would run into the next one: some classes have long names."""
    if pen.textlength(caption, font=_font(11)) <= width:
        return caption
    while caption and pen.textlength(f"{caption}...", font=_font(11)) > width:
        caption = caption[:-1]
    return f"{caption.rstrip(' ,')}..."


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
