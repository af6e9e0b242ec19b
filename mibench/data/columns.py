"""Which columns of a table are the images and the labels, by what they hold and not by name."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from mibench.data.images import Decoder, UnfitImageError
from mibench.data.tables import library
from mibench.errors import DataError

USUAL = ("label", "labels", "class", "target", "y")
"""Names that decide between several columns that could be labels."""
_WORDS = ("string", "large_string")
_BYTES = ("binary", "large_binary")


@dataclass(frozen=True)
class Columns:
    """The columns of a dataset.

    Attributes:
        image: the column of images.
        label: the column of labels.
        classes: names of the classes, in label order.
        values: what the label column holds for each class.
    """

    image: str
    label: str
    classes: tuple[str, ...]
    values: Mapping[Hashable, int]

    def class_of(self, value: Hashable) -> int:
        """Returns the class of a value of the label column."""
        return self.values[value]


def find_columns(tables: Mapping[str, Any], where: str) -> Columns:
    """Finds the columns and the classes of a dataset.

    Args:
        tables: its splits, with the same columns.
        where: what messages call the dataset.

    Raises:
        DataError: there is no column of images or of labels, or several could be it; labels are
            missing, or all are the same.
    """
    first = next(iter(tables.values()))
    image = _image_column(first, where)
    label = _label_column(first, image, where)
    for split, table in tables.items():
        lacking = {image, label} - set(table.column_names)
        if lacking:
            raise DataError(f"the split {split!r} of {where} has no column {lacking.pop()!r}.")
        if not len(table):
            raise DataError(f"the split {split!r} of {where} holds no images.")
    values, names = _classes(tables, label, where)
    return Columns(image, label, names, values)


def _image_column(table: Any, where: str) -> str:
    kinds: dict[str, Any] = table.features
    images = [name for name, kind in kinds.items() if _holds_images(kind)]
    images = images or [
        name
        for name, kind in kinds.items()
        if getattr(kind, "dtype", None) in _BYTES and _decodes(table, name)
    ]
    if len(images) == 1:
        return images[0]
    if images:
        raise DataError(f"{where} has several columns of images ({_listed(images)}); keep one.")
    raise DataError(f"{where} has no column of images (it has {_listed(list(kinds))}).")


def _holds_images(kind: Any) -> bool:
    return isinstance(kind, library().Image) or (isinstance(kind, dict) and "bytes" in kind)


def _decodes(table: Any, name: str) -> bool:
    try:
        Decoder(1)(next((cell for cell in table[:1][name] if cell is not None), b""))
    except UnfitImageError:
        return False
    return True


def _label_column(table: Any, image: str, where: str) -> str:
    class_label = library().ClassLabel
    kinds: dict[str, Any] = dict(table.features)
    del kinds[image]
    candidates = [name for name, kind in kinds.items() if _holds_labels(kind)]
    named = [name for name in candidates if isinstance(kinds[name], class_label)] or candidates
    usual = [name for name in named if name.lower() in USUAL]
    for choice in (named, usual):
        if len(choice) == 1:
            return choice[0]
    if candidates:
        raise DataError(
            f"{where} has several columns that could be the labels ({_listed(candidates)}); call "
            "one 'label' or keep only one."
        )
    raise DataError(
        f"{where} has no labels; a column of words, whole numbers or true and false is needed."
    )


def _holds_labels(kind: Any) -> bool:
    dtype = str(getattr(kind, "dtype", ""))
    scalar = isinstance(kind, library().Value | library().ClassLabel)
    return scalar and (dtype in _WORDS or dtype == "bool" or dtype.lstrip("u").startswith("int"))


def _classes(
    tables: Mapping[str, Any], label: str, where: str
) -> tuple[dict[Hashable, int], tuple[str, ...]]:
    """What the column holds -> class, and the names of the classes."""
    found: set[Any] = set()
    for split, table in tables.items():
        here = set(table.unique(label))
        if here & {None, -1} and (None in here or _names(table, label)):
            raise DataError(
                f"the split {split!r} of {where} has images without a label in the column "
                f"{label!r}; label or remove them."
            )
        found |= here
    if len(found) < 2:
        only = next(iter(found), "none")
        raise DataError(
            f"{where} holds one class only ({only}); at least two are needed, each in a subfolder "
            "of its own or with a label of its own."
        )
    names = _names(next(iter(tables.values())), label)
    if names:
        if any(_names(table, label) != names for table in tables.values()):
            raise DataError(f"the splits of {where} name their classes differently.")
        return {place: place for place in range(len(names))}, names
    values = sorted(found)
    return {value: place for place, value in enumerate(values)}, tuple(map(str, values))


def _names(table: Any, label: str) -> tuple[str, ...]:
    """The names of a column that has its own; empty if it has none."""
    return tuple(getattr(table.features[label], "names", None) or ())


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
