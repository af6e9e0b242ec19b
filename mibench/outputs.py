"""The files of a run: record, per-image values, reconstructions and a grid to look at."""

from __future__ import annotations

import hashlib
import io
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image
from torch import Tensor

from mibench import gallery
from mibench.errors import StorageError
from mibench.evaluate import Result, manifest_text
from mibench.files import ensure_writable, write_atomically
from mibench.record import Record

RECORD = "record.json"
PER_IMAGE = "per_image.parquet"
MANIFEST = "manifest.txt"
GRID = "grid.png"
RECONSTRUCTIONS = "reconstructions"

STALE = 60.0
"""Seconds after which an unfinished file has no writer any more."""


def write_result(result: Result, out: Path) -> Record:
    """Writes everything that a finished run leaves behind, the record last.

    A reader that finds a record with status ``success`` therefore finds all other files whole.

    Of a suite, each attack gets a folder of its own inside.

    Args:
        result: what `evaluate` returned.
        out: the run's folder; other files in it stay untouched.

    Returns:
        The record as written, with the hash of every file in `Record.files`. The entry
        ``reconstructions`` is the SHA-256 over the PNG files' bytes in order.

    Raises:
        StorageError: something cannot be written.
    """
    for name, part in result.parts.items():
        write_result(part, out / name)
    folder = out / RECONSTRUCTIONS
    ensure_writable(folder)
    images = to_bytes(result.reconstructions)
    together = hashlib.sha256()
    for index, image in enumerate(images):
        data = _png(Image.fromarray(image))
        together.update(data)
        write_atomically(folder / f"{index:04}.png", data)
    files = {RECONSTRUCTIONS: together.hexdigest()}
    write_atomically(out / MANIFEST, manifest_text(result.manifest))
    assert result.record.manifest is not None
    files[MANIFEST] = result.record.manifest

    grid = gallery.draw(
        originals=to_bytes(result.originals.images()),
        reconstructions=images,
        permuted=to_bytes(result.controls["permuted"]),
        labels=_captions(result),
        per_image={name: values.tolist() for name, values in result.per_image.items()},
        scores=result.record.scores,
        title=f"{result.record.defense.name} against {result.record.attack.name}",
    )
    for name, data in (
        (PER_IMAGE, _parquet(per_image_table(result))),
        (GRID, _png(grid)),
    ):
        write_atomically(out / name, data)
        files[name] = hashlib.sha256(data).hexdigest()
    record = result.record.model_copy(update={"files": files})
    write_record(record, out)
    return record


def write_record(record: Record, out: Path) -> None:
    """Writes a record into a run's folder.

    Raises:
        StorageError: it cannot be written; the record that was there, if any, is untouched.
    """
    write_atomically(out / RECORD, record.to_json())


def per_image_table(result: Result) -> pd.DataFrame:
    """Returns one row per attacked image: index, sha256, label in words, then the metrics' values.

    Classes have a column ``label`` with their number beside ``class``, their name. Of attributes,
    ``class`` lists those that hold, and ``correct`` is the share that was told rightly.
    """
    labels, classes = result.originals.labels, result.originals.labels.ndim == 1
    columns: dict[str, object] = {
        "index": np.arange(len(labels)),
        "sha256": result.originals.hashes(),
    }
    if classes:
        columns["label"] = labels.tolist()
    columns["class"] = [result.task.describe(label) for label in labels]
    for name, values in result.per_image.items():
        array = values.detach().cpu().numpy()
        columns[name] = array.astype(bool) if name == "correct" and classes else array
    return pd.DataFrame(columns)


def remove_leftovers(out: Path) -> None:
    """Removes what a killed run was writing; nothing with another name, nothing recent.

    Raises:
        StorageError: a leftover cannot be removed.
    """
    for folder in (out, out / RECONSTRUCTIONS):
        for path in folder.glob(".mibench-*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"cannot remove {path}: {error.strerror}") from error


def to_bytes(images: Tensor) -> list[np.ndarray]:
    """Returns images (N, 3, H, W) in [0, 1] as uint8 arrays (H, W, 3), rounded."""
    scaled = (images.detach().cpu().float() * 255).round().clamp(0, 255)
    return list(scaled.permute(0, 2, 3, 1).numpy().astype(np.uint8))


def _captions(result: Result) -> list[str]:
    """Names of the classes; lists of attributes are too long for a caption."""
    labels = result.originals.labels
    return [result.task.describe(label) if labels.ndim == 1 else "" for label in labels]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _parquet(table: pd.DataFrame) -> bytes:
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    return buffer.getvalue()
