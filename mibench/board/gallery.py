"""A row's picture: a few originals beside what each attack made of them, small enough for git."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from mibench.board.model import Gallery
from mibench.errors import MibenchError
from mibench.gallery import FIRST_CHOICE, ranking
from mibench.outputs import PER_IMAGE, PERMUTED, RECONSTRUCTIONS
from mibench.record import Record
from mibench.registry import datasets

FILE = "gallery.webp"
MOST = 16
"""Images shown at most."""
COMMON = 4
"""The first attacked images stand in every gallery, so that defenses compare on the same ones."""
MOST_ATTACKS = 10
"""Columns of single attacks at most: those that were the worst for the most images."""
LIMIT = 60_000
"""Bytes that the file should not exceed."""
QUALITIES = (95, 90, 85, 80, 75, 70, 60, 50)
"""Tried in this order where the picture without loss is too large."""
ORIGINAL, WORST, CONTROL = "original", "worst", "permuted"
"""Columns that are no single attack."""


def draw(folder: Path, record: Record, originals: np.ndarray | None) -> tuple[bytes, Gallery] | str:
    """Draws the gallery of a finished run.

    Of a suite, or of several coalitions, the worst reconstruction of each image stands beside those
    of the single attacks. The control is what the attack made of another image's message; of
    several attacks, the worst of their controls. Nothing is enlarged: the page does that.

    Args:
        folder: of the run, with its images.
        record: what it says.
        originals: the attacked images in their order, (N, 3, H, W) or (N, H, W, 3); uint8, or
            floats in [0, 1]. None where they are not at hand.

    Returns:
        The file, a WebP of `LIMIT` bytes or less where quality 50 allows that, and what it holds;
        or in one sentence why there is none.
    """
    if reason := refusal(record):
        return reason
    if originals is None:
        return "the original images were not at hand when the entry was made"
    attacked = _bytes(originals)
    columns = _Columns(folder, record, len(attacked))
    try:
        order = columns.order()
        rows = chosen(order)
        pictures = columns.pictures(rows)
    except (OSError, ValueError, KeyError) as error:
        return f"the images of the run cannot be read ({error})"
    strips = [[attacked[index] for index in rows], *pictures.values()]
    sides = {image.shape for strip in strips for image in strip}
    if len(sides) > 1:
        return f"the images of the run differ in size ({', '.join(map(str, sorted(sides)))})"
    sheet = np.concatenate([np.concatenate(strip, axis=0) for strip in strips], axis=1)
    data = _encoded(sheet)
    side = int(attacked.shape[1])
    names = [ORIGINAL, *pictures]
    return data, Gallery(
        sha256=hashlib.sha256(data).hexdigest(), side=side, columns=names, images=rows
    )


def refusal(record: Record) -> str | None:
    """Why the private images of a record may not be shown; None where they may."""
    if record.data is None:
        return "the record does not say whose images they are"
    private = (record.protocol.values.get("data") or {}) if record.protocol.values else {}
    role = private.get("private") if isinstance(private, dict) else None
    other = role.get("dataset") if isinstance(role, dict) else None
    for name in dict.fromkeys([record.data.dataset, *([other] if isinstance(other, str) else [])]):
        try:
            shown = name in datasets and datasets.load(name).shown
        except MibenchError:
            shown = False
        if not shown:
            return f"the terms of {name} are not known to let its images stand on a public page"
    return None


def chosen(order: Sequence[int]) -> list[int]:
    """Which images are shown, the most leaked first.

    The first `COMMON` ones always, so that nobody chooses them; the others evenly from the most
    leaked to the least.

    Args:
        order: all attacked images, the most leaked first.
    """
    if len(order) <= MOST:
        return list(order)
    kept = set(range(COMMON))
    rest = [index for index in order if index not in kept]
    places = np.linspace(0, len(rest) - 1, MOST - COMMON).round().astype(int)
    kept |= {rest[place] for place in places}
    return [index for index in order if index in kept]


class _Columns:
    """The folders of a run that give a column each."""

    def __init__(self, folder: Path, record: Record, count: int) -> None:
        self._folder = folder
        self._record = record
        self._count = count
        scored = [part for part in record.suite if part.scores and _is_name(part.attack)]
        # The same attack on another coalition has a part of its own: too many columns for a page.
        credit = {part.attack: part.share_of_worst.get(FIRST_CHOICE, 0.0) for part in scored}
        best = sorted(credit, key=credit.__getitem__, reverse=True)[:MOST_ATTACKS]
        self._parts = [name for name in credit if name in best]
        self._all = list(credit)

    def order(self) -> list[int]:
        """All images, the most leaked first by the scores of the headline."""
        table = pd.read_parquet(self._folder / PER_IMAGE)
        if len(table) != self._count:
            raise ValueError(f"{len(table)} images were scored and {self._count} are given")
        return ranking(_values(table), self._record.scores, self._count)[0]

    def pictures(self, rows: list[int]) -> dict[str, list[NDArray[np.uint8]]]:
        """Images (H, W, 3) by column, for the chosen rows; without the originals."""
        if not self._record.suite:
            return {
                self._record.attack.name: [self._image("", RECONSTRUCTIONS, at) for at in rows],
                CONTROL: [self._image("", PERMUTED, at) for at in rows],
            }
        found = {WORST: [self._image("", RECONSTRUCTIONS, at) for at in rows]}
        if len(self._all) > 1:
            for name in self._parts:
                found[name] = [self._image(name, RECONSTRUCTIONS, at) for at in rows]
        whose = self._worst_controls()
        found[CONTROL] = [self._image(whose[at], PERMUTED, at) for at in rows]
        return found

    def _worst_controls(self) -> list[str]:
        """For each image the attack whose control shows most of it."""
        metric = next(
            (one for one in self._record.scores if one.metric == FIRST_CHOICE and one.n),
            next(one for one in self._record.scores if one.n),
        )
        column = f"{PERMUTED}_{metric.metric}"
        values = np.stack(
            [pd.read_parquet(self._folder / name / PER_IMAGE)[column] for name in self._all]
        )
        picked = values.argmax(axis=0) if metric.higher_is_better else values.argmin(axis=0)
        return [self._all[int(at)] for at in picked]

    def _image(self, part: str, kind: str, index: int) -> NDArray[np.uint8]:
        with Image.open(self._folder / part / kind / f"{index:04}.png", formats=("PNG",)) as image:
            return np.asarray(image.convert("RGB"))


def _is_name(text: str) -> bool:
    """Whether a text of a record names a folder beside it, and nothing above."""
    return text not in ("", ".", "..") and Path(text).name == text


def _values(table: pd.DataFrame) -> dict[str, list[float]]:
    return {str(name): table[name].tolist() for name in table.columns if name not in ("class",)}


def _bytes(images: np.ndarray) -> NDArray[np.uint8]:
    """Images (N, H, W, 3), uint8."""
    if images.ndim != 4 or 3 not in (images.shape[1], images.shape[3]):
        raise ValueError(f"originals must be (N, 3, H, W) or (N, H, W, 3), not {images.shape}")
    if images.shape[3] != 3:
        images = images.transpose(0, 2, 3, 1)
    if images.dtype == np.uint8:
        return images
    return np.asarray((images * 255).round().clip(0, 255), dtype=np.uint8)


def _encoded(sheet: NDArray[np.uint8]) -> bytes:
    data = _webp(sheet, lossless=True, quality=100)
    for quality in QUALITIES:
        if len(data) <= LIMIT:
            break
        data = _webp(sheet, lossless=False, quality=quality)
    return data


def _webp(sheet: NDArray[np.uint8], *, lossless: bool, quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="WEBP", lossless=lossless, quality=quality, method=6)
    return buffer.getvalue()


def webp_size(data: bytes) -> tuple[int, int] | None:
    """Width and height that the head of a WebP file tells; None where it is none.

    Nothing is decoded: a few hundred bytes can hold a picture of gigabytes.
    """
    if (data[:4], data[8:12]) != (b"RIFF", b"WEBP") or len(data) < 30:
        return None
    kind, head = data[12:16], data[20:30]
    if kind == b"VP8 " and head[3:6] == b"\x9d\x01\x2a":
        sides = int.from_bytes(head[6:8], "little"), int.from_bytes(head[8:10], "little")
        return sides[0] & 0x3FFF, sides[1] & 0x3FFF
    if kind == b"VP8L" and head[:1] == b"\x2f":
        bits = int.from_bytes(head[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    # Extended files can hold frames and further pictures; `draw` writes none.
    return None
