"""The files of a run: record, per-image values, reconstructions and a grid to look at."""

from __future__ import annotations

import hashlib
import io
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from mibench import gallery
from mibench.errors import StorageError
from mibench.evaluate import Result, manifest_text
from mibench.files import ensure_writable, write_atomically
from mibench.record import Record
from mibench.stored import to_bytes, to_png

RECORD = "record.json"
PER_IMAGE = "per_image.parquet"
MANIFEST = "manifest.txt"
GRID = "grid.png"
RECONSTRUCTIONS = "reconstructions"
PERMUTED = "permuted"
UNDEFENDED = "undefended"
GUESSES = "guesses"
PRIOR_SAMPLE = "prior-sample"
OF_CONTROLS = (PERMUTED, UNDEFENDED, GUESSES, PRIOR_SAMPLE)
"""Folders of images that a run leaves beside its reconstructions, where it has them."""
SAME_FOR_ALL = ("mean-image", "typical-image")
"""Guesses that are one image, whatever is attacked; stored once."""
WEIGHTS = "weights"
"""Folder of the trained defense, as the cache keeps it, in the runs of submissions."""

STALE = 60.0
"""Seconds after which an unfinished file has no writer any more."""


def write_result(result: Result, out: Path) -> Record:
    """Writes everything that a finished run leaves behind, the record last.

    A reader that finds a record with status ``success`` therefore finds all other files whole.

    Of several attacks, each gets a folder of its own inside, with the images of its controls: what
    its scores can be computed from again.

    Args:
        result: what `evaluate` returned.
        out: the run's folder; other files in it stay untouched.

    Returns:
        The record as written, with the hash of every file in `Record.files`. The entry of a folder
        of images is the SHA-256 over the PNG files' bytes in order.

    Raises:
        StorageError: something cannot be written.
    """
    for name, part in result.parts.items():
        write_result(part, out / name)
    images = to_bytes(result.reconstructions)
    files = {}
    for folder, named in _pictures(result, images).items():
        ensure_writable(out / folder)
        together = hashlib.sha256()
        for name, image in named.items():
            data = to_png(Image.fromarray(image))
            together.update(data)
            write_atomically(out / folder / f"{name}.png", data)
        files[folder] = together.hexdigest()
    write_atomically(out / MANIFEST, manifest_text(result.manifest))
    assert result.record.manifest is not None
    files[MANIFEST] = result.record.manifest

    written = {PER_IMAGE: _parquet(per_image_table(result))}
    if "permuted" in result.controls:  # not so for an old run that was scored anew
        written[GRID] = to_png(_grid(result, images))
    for name, data in written.items():
        write_atomically(out / name, data)
        files[name] = hashlib.sha256(data).hexdigest()
    record = result.record.model_copy(update={"files": files})
    write_record(record, out)
    return record


def _pictures(result: Result, images: list[np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """All images of a result, by folder and name.

    The worst of several attacks has a worst control for each metric, so those stay with the parts.
    """
    found = {RECONSTRUCTIONS: _numbered(images)}
    if result.undefended is None:
        return found
    found[PERMUTED] = _numbered(to_bytes(result.controls["permuted"]))
    if result.undefended is not result.reconstructions:
        found[UNDEFENDED] = _numbered(to_bytes(result.undefended))
    guesses = {name: one for name, one in result.controls.items() if name != "permuted"}
    found[GUESSES] = {
        name: to_bytes(one[:1])[0] for name, one in guesses.items() if name in SAME_FOR_ALL
    }
    for name, one in guesses.items():
        if name not in SAME_FOR_ALL:
            found[name] = _numbered(to_bytes(one))
    return found


def _numbered(images: list[np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{index:04}": image for index, image in enumerate(images)}


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
    for folder in (out, *(out / name for name in (RECONSTRUCTIONS, *OF_CONTROLS))):
        for path in folder.glob(".mibench-*.tmp"):
            try:
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise StorageError(f"cannot remove {path}: {error.strerror}") from error


def _grid(result: Result, images: list[np.ndarray]) -> Image.Image:
    return gallery.draw(
        originals=to_bytes(result.originals.images()),
        reconstructions=images,
        permuted=to_bytes(result.controls["permuted"]),
        labels=_captions(result),
        per_image={name: values.tolist() for name, values in result.per_image.items()},
        scores=result.record.scores,
        title=f"{result.record.defense.name} against {result.record.attack.name}",
    )


def _captions(result: Result) -> list[str]:
    """Names of the classes; lists of attributes are too long for a caption."""
    labels = result.originals.labels
    return [result.task.describe(label) if labels.ndim == 1 else "" for label in labels]


def _parquet(table: pd.DataFrame) -> bytes:
    """The table without indexes for searching and a second schema: half of a small file, unused."""
    buffer = io.BytesIO()
    table.to_parquet(
        buffer,
        index=False,
        compression="zstd",
        use_dictionary=False,
        write_statistics=False,
        store_schema=False,
    )
    return buffer.getvalue()
