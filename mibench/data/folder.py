"""A user's own images: one subfolder for each class, or parquet files."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch

from mibench import progress
from mibench.data.columns import find_columns
from mibench.data.content import content_key
from mibench.data.decoded import EncodedDataset, Source
from mibench.data.images import Decoder
from mibench.data.sets import ImageSet
from mibench.data.tables import Rows, encoded, library, read_parquet
from mibench.errors import DataError
from mibench.registry import fingerprint
from mibench.task import Classification

TOLERATED = 0.01
"""Unreadable images, as a share, that are left out; more are refused."""
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
"""Names of files and folders that are splits, and what the splits are called."""
_SUFFIXES = {
    *(".bmp", ".gif", ".jp2", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
}
_LAYOUT = "give one subfolder of images for each class, or parquet files"


@dataclass(frozen=True)
class _Found:
    """One split of the folder.

    Attributes:
        table: its rows.
        files: what the rows were read from.
    """

    table: Any
    files: list[Path]


class Folder(EncodedDataset):
    """The images of a folder on this machine.

    The folder holds one subfolder for each class, or parquet files with a column of images and one
    of labels. Subfolders or files that are called ``train``, ``test`` or ``validation`` (``val``,
    ``valid``) are splits if there are at least two and one is ``train``; anything else is one
    split, ``train``. Labels become classes in sorted order. A few unreadable images are left out.

    Args:
        path: the folder, or one parquet file.
        image_size: side of the images that are handed out, in pixels.
        cache: folder in which decoded images are kept.

    Raises:
        DataError: there is no such folder, or no images of two or more classes in it.
    """

    name: ClassVar[str] = "folder"
    version: ClassVar[int] = 1
    more = "Give more images, or a protocol made for this folder"

    def __init__(self, path: Path, image_size: int, cache: Path) -> None:
        super().__init__(None, image_size, cache)
        self.path = path
        try:
            root = _named(path.expanduser().absolute())
        except RuntimeError as error:
            raise DataError(f"there is no folder {path}: no such user; check the path.") from error
        try:
            self._root = root if root.is_dir() else root.parent
            self._found, where = _find(root, path)
        except OSError as error:
            raise DataError(
                f"{path} cannot be read: {error.strerror or error}; check the path and whether "
                "you may read all below it."
            ) from error
        self._columns = find_columns(
            {split: found.table for split, found in self._found.items()}, where
        )
        self.task = Classification(self._columns.classes)
        self._told: set[tuple[str, int, int]] = set()

    @property
    def splits(self) -> list[str]:
        """The names of the splits."""
        return list(self._found)

    def load(self, split: str, start: int, count: int) -> ImageSet:
        """Decodes a slice of a split, without unreadable images; see `Dataset.load`."""
        decoded = self.enough(split, start, count)
        images, unfit, reason = decoded.load(start, count)
        if unfit:
            rows = decoded.source.rows.read(unfit[:5])
            named = ", ".join(map(self._called, rows, unfit)) + (", ..." if unfit[5:] else "")
            if len(unfit) > TOLERATED * count:
                raise DataError(
                    f"{len(unfit)} of {count} images in {self.path} cannot be used: {named} (the "
                    f"first {reason}); mend or remove them."
                )
            if (split, start, count) not in self._told:
                self._told.add((split, start, count))
                progress.note(f"left out of {self.path}: {len(unfit)} unreadable images ({named})")
        animated = decoded.animated(start, count)
        if animated:
            progress.note(f"{self.path}: of {animated} animated images, the first frame is used")
        return images

    def _called(self, row: Mapping[str, Any], number: int) -> str:
        path = (row[self._columns.image] or {}).get("path")
        if not path:
            return f"image {number}"
        inside = Path(path).is_relative_to(self._root)
        return Path(path).relative_to(self._root).as_posix() if inside else str(path)

    def where(self, split: str) -> str:
        """The split and the folder."""
        return f"the split {split!r} of {self.path}"

    def source(self, split: str) -> Source:
        """Hashes the files of a split; see `EncodedDataset.source`."""
        if split not in self._found:
            raise DataError(
                f"{self.path} has no split {split!r} (it has {', '.join(self.splits)}); name a "
                "subfolder so, or use a protocol made for this folder."
            )
        found, columns = self._found[split], self._columns
        return Source(
            title=f"{self.path} {split}",
            origin={
                "dataset": self.name,
                "code": fingerprint(type(self)),
                "columns": [columns.image, columns.label],
                "classes": list(columns.classes),
                "split": split,
                "files": content_key(found.files, self._root, str(self.path)),
            },
            rows=Rows(encoded(found.table, columns.image, str(self.path)), columns.image),
            image_column=columns.image,
            label=lambda row: torch.tensor(columns.class_of(row[columns.label])),
            blank=torch.tensor(-1),
            decoder=Decoder(self.image_size),
        )


def _find(root: Path, path: Path) -> tuple[dict[str, _Found], str]:
    """Returns the splits, and what messages call the place of their labels."""
    if not root.exists():
        raise DataError(f"there is no folder {path}; check the path.")
    files = _parquet_files(root)
    holding = [one for one in _folders(root) if _holds_images(one)] if root.is_dir() else []
    if files and len(holding) < 2:
        others = f" and {len(files) - 1} more" if files[1:] else ""
        where = str(path) if root.is_file() else f"{path} ({files[0].name}{others})"
        return _from_parquet(files, path, root), where
    if files:
        progress.note(
            f"{path}: {len(files)} parquet files are ignored, as there are class folders "
            f"({_listed(files, root)})"
        )
    return _from_images(root, path, holding), str(path)


# --- class subfolders -----------------------------------------------------------------------------


def _from_images(root: Path, path: Path, holding: Sequence[Path]) -> dict[str, _Found]:
    if not root.is_dir():
        raise DataError(f"{path} is neither a folder nor a parquet file; {_LAYOUT}.")
    if len(holding) == 1 and holding[0].name.lower() in SPLITS:
        only = holding[0].name
        raise DataError(
            f"{path} holds images in {only!r} only: a second split beside it is missing, such as "
            f"test/; or put the class folders of {only!r} directly into {path}."
        )
    parts = {SPLITS[one.name.lower()]: one for one in _folders(root) if one.name.lower() in SPLITS}
    if len(parts) < 2 or "train" not in parts:
        parts = {"train": root}
    else:
        stray = next((one for one in holding if one not in parts.values()), None)
        if stray is not None:
            raise DataError(
                f"{path} holds images in {stray.name!r} beside its splits {', '.join(parts)}; "
                "move them away."
            )
    found = {split: _class_table(one, path) for split, one in parts.items()}
    _tell_what_is_passed_over(list(parts.values()), root, path)
    return found


def _class_table(root: Path, path: Path) -> _Found:
    loose = next((_named(one) for one in sorted(root.iterdir()) if _is_image(one.name)), None)
    if loose is not None:
        raise DataError(
            f"{path} holds images outside of class folders, such as {loose.name}; put each into "
            "the folder of its class."
        )
    files = [(file, folder.name) for folder in _folders(root) for file in _images(folder)]
    if not files:
        raise DataError(f"no images in {path}; {_LAYOUT}.")
    datasets = library()
    features = {"image": datasets.Image(decode=False), "label": datasets.Value("string")}
    paths, labels = zip(*files, strict=True)
    rows = {"image": [str(file) for file in paths], "label": list(labels)}
    return _Found(
        datasets.Dataset.from_dict(rows, features=datasets.Features(features)), list(paths)
    )


def _tell_what_is_passed_over(parts: Sequence[Path], root: Path, path: Path) -> None:
    folders = [folder for part in parts for folder in _folders(part)]
    empty = [folder for folder in folders if not _holds_images(folder)]
    empty += [one for part in parts for one in sorted(part.iterdir()) if _leads_nowhere(one)]
    if empty:
        progress.note(f"{path}: {len(empty)} class folders hold no images ({_listed(empty, root)})")
    links = [
        Path(place, name)
        for folder in folders
        for place, inner, _ in _walk(folder)
        for name in inner
        if Path(place, name).is_symlink()
    ]
    if links:
        progress.note(
            f"{path}: {len(links)} links to folders inside of classes are not followed "
            f"({_listed(links, root)})"
        )


def _leads_nowhere(one: Path) -> bool:
    return one.is_symlink() and not one.exists() and not _is_hidden(one.name)


def _folders(root: Path) -> list[Path]:
    return sorted(
        _named(one) for one in root.iterdir() if one.is_dir() and not _is_hidden(one.name)
    )


def _images(folder: Path) -> Iterator[Path]:
    for place, _, names in _walk(folder):
        yield from (_named(Path(place, name)) for name in sorted(names) if _is_image(name))


def _holds_images(folder: Path) -> bool:
    return next(_images(folder), None) is not None


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walks through a folder in sorted order, without what is hidden; links are not followed."""
    for place, inner, names in os.walk(folder, onerror=_refuse):
        inner[:] = sorted(name for name in inner if not _is_hidden(name))
        yield place, inner, names


def _refuse(error: OSError) -> NoReturn:
    raise error


def _named(path: Path) -> Path:
    """Returns a path that can be written down."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"the name {str(path)!r} is not UTF-8; rename it.") from error
    return path


def _listed(paths: Sequence[Path], root: Path) -> str:
    names = ", ".join(one.relative_to(root).as_posix() for one in paths[:5])
    # What is passed over may have any name.
    names = names.encode(errors="backslashreplace").decode()
    return names + (", ..." if paths[5:] else "")


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in _SUFFIXES and not _is_hidden(name)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


# --- parquet files --------------------------------------------------------------------------------


def _parquet_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root] if root.suffix == ".parquet" else []
    files = sorted(file for file in root.rglob("*.parquet") if file.is_file())
    return [
        _named(file) for file in files if not any(map(_is_hidden, file.relative_to(root).parts))
    ]


def _from_parquet(files: list[Path], path: Path, root: Path) -> dict[str, _Found]:
    root = root if root.is_dir() else root.parent
    named = {file: _split_of(file) for file in files}
    splits = sorted({split for split in named.values() if split is not None}, reverse=True)
    if len(splits) < 2 or "train" not in splits:
        return {"train": _Found(read_parquet(files, str(path), root), files)}
    stray = next((file for file, split in named.items() if split is None), None)
    if stray is not None:
        raise DataError(
            f"{path} holds {stray.name} beside its splits {', '.join(splits)}; move it away."
        )
    parts = {split: [file for file in files if named[file] == split] for split in splits}
    return {
        split: _Found(read_parquet(part, str(path), root), part) for split, part in parts.items()
    }


def _split_of(file: Path) -> str | None:
    """The split that a file's name starts with, or that its folder is called."""
    first = re.split(r"[-._ 0-9]", file.stem.lower(), maxsplit=1)[0]
    return SPLITS.get(first) or SPLITS.get(file.parent.name.lower())
