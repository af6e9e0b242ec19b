"""A run's folder as the checks of records see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mibench.checks.base import Verdict
from mibench.outputs import RECONSTRUCTIONS
from mibench.record import PLACES, Record, Score


@dataclass(frozen=True)
class Problem:
    """One thing that does not hold."""

    text: str
    verdict: Verdict = Verdict.FAILED


@dataclass(frozen=True)
class Run:
    """A folder with a record that can be read.

    Attributes:
        folder: where everything lies.
        record: of a run that succeeded.
        table: per-image values; None where they cannot be read.
        manifest: hashes of the private images; None where they cannot be read.
        data_root: datasets in the hub's layout, or None.
        cache: where decoded images are kept, or None.
    """

    folder: Path
    record: Record
    table: pd.DataFrame | None
    manifest: list[str] | None
    data_root: Path | None
    cache: Path | None

    def rule(self, name: str) -> Mapping[str, Any]:
        """A part of the protocol's values; empty where the record has none."""
        value = self.record.protocol.values.get(name)
        return value if isinstance(value, Mapping) else {}

    @property
    def attacked(self) -> int:
        """How many images the record says were attacked; 0 where it does not."""
        return self.record.data.images.get("attacked", 0) if self.record.data is not None else 0

    def pictures(self, kind: str = RECONSTRUCTIONS) -> list[Path]:
        """The files of the reconstructions or of a control, in order."""
        return sorted((self.folder / kind).glob("*.png"))

    def column(self, name: str) -> list[object] | None:
        """A column of the table as a list; None where there is none."""
        if self.table is None or name not in self.table.columns:
            return None
        return list(self.table[name].tolist())

    def values(self, name: str) -> Tensor | None:
        """A column of finite numbers (N,) float64; None where there is none."""
        if self.table is None or name not in self.table.columns or not len(self.table):
            return None
        column = self.table[name]
        if not pd.api.types.is_float_dtype(column):
            return None
        found = torch.tensor(column.tolist(), dtype=torch.float64)
        return found if bool(found.isfinite().all()) else None

    def placed_scores(self) -> Iterator[tuple[str, Score]]:
        """Every score of reconstructions, with the field that it stands in."""
        for place in PLACES:
            for score in getattr(self.record, place):
                yield place, score
