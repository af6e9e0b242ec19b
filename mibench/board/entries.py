"""What lies in git: reads all of it, refuses what does not belong there, adds to it.

A record and its values per image never change. ``entry.json`` beside them grows by verifications.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel

from mibench import __version__
from mibench.board import layout
from mibench.board.gallery import refusal, webp_size
from mibench.board.model import (
    FORMAT,
    Advisory,
    BestKnown,
    CheckLine,
    Entry,
    Gallery,
    Level,
    Listed,
    Origin,
    Verification,
)
from mibench.checks.base import one_line
from mibench.errors import BoardError, InvalidParamsError, MibenchError
from mibench.files import (
    Json,
    pretty_json,
    write_atomically,
    write_folder,
)
from mibench.outputs import PER_IMAGE, RECORD
from mibench.params import build
from mibench.record import Record, read_record
from mibench.submission.marked import read_marked

if TYPE_CHECKING:
    from mibench.artifacts import ArtifactStore
    from mibench.checks.base import Finding

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
Say = Callable[[str], None]
MOST_VALUES = 10**7
"""Rows times columns of the values per image, at most: a few bytes can say "a million zeros"."""
TEXTS = {"sha256", "class"}
"""Columns of the values per image that hold no numbers."""


@dataclass(frozen=True, eq=False)
class Held:
    """A record with what stands beside it, and its values per image."""

    listed: Listed
    table: pd.DataFrame

    @property
    def record(self) -> Record:
        """The record."""
        return self.listed.record


@dataclass(frozen=True)
class Contents:
    """All that a version of the leaderboard is made from.

    Attributes:
        held: the records, by id.
        best_known: results of submitted attacks, by file name.
        advisories: the newest first.
    """

    held: Mapping[str, Held]
    best_known: tuple[BestKnown, ...]
    advisories: tuple[Advisory, ...]


def by_start(held: Iterable[Held]) -> list[Held]:
    """The one that was made first stands first: of two runs of one attack and seed it counts."""
    return sorted(held, key=lambda one: (one.record.started, one.listed.id))


# --- reading -------------------------------------------------------------------------------------


def read(root: Path) -> Contents:
    """Reads and checks everything in a version's folder but the pages.

    Raises:
        BoardError: something does not belong there, is broken or was edited; the message names
            every such file.
    """
    wrong: list[str] = []
    if not root.is_dir() or root.is_symlink():
        raise BoardError(f"there is no leaderboard in {root}; give a folder such as leaderboard/v1")
    for path in _listed(root):
        if path.is_symlink():
            wrong.append(f"{path}: it is a link; put the folder itself here")
        elif not path.is_dir() or path.name not in layout.INSIDE:
            known = ", ".join(layout.INSIDE)
            wrong.append(f"{path}: only the folders {known} belong here; remove it")
    held: dict[str, Held] = {}
    for folder in _listed(layout.records(root)):
        found = _entry(folder, wrong.append)
        if found is not None:
            held[folder.name] = found
    best = [
        one
        for path in _listed(layout.best_known(root))
        for one in [_best_known(path, held, wrong.append)]
        if one is not None
    ]
    advisories = [
        one
        for path in _listed(layout.advisories(root))
        for one in [_advisory(path, wrong.append)]
        if one is not None
    ]
    if wrong:
        raise BoardError("; ".join(wrong))
    newest = sorted(advisories, key=lambda one: (one.date, one.id), reverse=True)
    return Contents(held, tuple(best), tuple(newest))


def read_entry(root: Path, record: str) -> Entry:
    """Reads ``entry.json`` of one record.

    Raises:
        BoardError: there is none, or it is broken.
    """
    path = layout.record_folder(root, record) / layout.ENTRY
    if not layout.ID.fullmatch(record) or not path.is_file():
        raise BoardError(f"there is no record {record!r} in {layout.records(root)}")
    return _model(Entry, _json(path), path)


def size(root: Path) -> int:
    """Bytes of all files of all versions and of the advisories."""
    return sum(path.stat().st_size for path in root.resolve().parent.rglob("*") if path.is_file())


def _listed(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _entry(folder: Path, say: Say) -> Held | None:
    """One record with all that lies beside it; what is wrong with it is said."""
    if folder.is_symlink() or not folder.is_dir() or not layout.ID.fullmatch(folder.name):
        say(f"{folder}: records lie in folders that are named by their id; remove it")
        return None
    told: list[str] = []
    files = {path.name: path for path in _listed(folder)}
    for name, path in files.items():
        told += [f"{path}: {why}" for why in _unfit(path, layout.FILES, _most(name))]
    needed = set(layout.FILES) - {layout.GALLERY}
    told += [f"{folder}: {name} is missing" for name in sorted(needed - set(files))]
    found = None
    if not told:
        found = _whole(folder, told.append)
    for one in told:
        say(one)
    return None if told else found


def _most(name: str) -> int:
    return layout.LARGEST_GALLERY if name == layout.GALLERY else layout.LARGEST_FILE


def _unfit(path: Path, names: tuple[str, ...], most: int) -> Iterator[str]:
    """Why a file may not lie where it lies."""
    if path.is_symlink():
        yield "it is a link; put the file itself here"
    elif not path.is_file():
        yield "it is no plain file; remove it"
    elif path.name not in names:
        yield f"only {', '.join(names)} may lie here; remove it"
    elif path.stat().st_size > most:
        yield f"it has {path.stat().st_size:,} bytes, and {most:,} are allowed"


def _whole(folder: Path, say: Say) -> Held | None:
    record = _attempted(lambda: read_record(folder), say)
    entry = _attempted(
        lambda: _model(Entry, _json(folder / layout.ENTRY), folder / layout.ENTRY), say
    )
    if record is None or entry is None:
        return None
    data = (folder / RECORD).read_bytes()
    if record.id != folder.name:
        say(f"{folder / RECORD}: its content has the id {record.id}; it was edited, restore it")
    elif pretty_json(json.loads(data)) != data:
        say(f"{folder / RECORD}: it is not as a run writes it; restore it")
    if record.status != "success":
        say(f"{folder / RECORD}: the run did not finish")
    if entry.record != folder.name:
        say(f"{folder / layout.ENTRY}: it belongs to record {entry.record!r}")
    if entry.format_version > FORMAT:
        say(f"{folder / layout.ENTRY}: format {entry.format_version} needs a newer mibench")
    for problem in _gallery_problems(folder, record, entry.gallery, entry.gallery_reason):
        say(problem)
    table = _table(folder / PER_IMAGE, record, say)
    return None if table is None else Held(Listed(record, entry), table)


def _table(path: Path, record: Record, say: Say) -> pd.DataFrame | None:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != record.files.get(PER_IMAGE):
        say(f"{path}: it is not the file that the record was written with; restore it")
        return None
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        shape = (file.metadata.num_rows, file.metadata.num_columns)
        if shape[0] * shape[1] > MOST_VALUES:
            raise ValueError(f"it has {shape[0]:,} rows of {shape[1]:,} columns, too many")
        # A few bytes can stand for a long text in every row.
        texts = [one.name for one in file.schema_arrow if not _is_number(one.type)]
        if strangers := sorted(set(texts) - TEXTS):
            raise ValueError(f"the column {one_line(strangers[0])!r} holds no numbers")
        table: pd.DataFrame = pq.read_table(io.BytesIO(data), read_dictionary=texts).to_pandas()
    except Exception as error:
        say(f"{path}: it cannot be read ({' '.join(str(error).split())})")
        return None
    attacked = None if record.data is None else record.data.images.get("attacked")
    if len(table) != attacked:
        say(f"{path}: it has {len(table)} rows for {attacked} attacked images")
    return table


def _is_number(kind: pa.DataType) -> bool:
    tests = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean)
    return any(test(kind) for test in tests)


def _gallery_problems(
    folder: Path, record: Record, gallery: Gallery | None, reason: str | None
) -> Iterator[str]:
    path = folder / layout.GALLERY
    if gallery is None:
        if path.exists():
            yield f"{path}: {layout.ENTRY} does not name it; remove it"
        if reason is None:
            yield f"{folder / layout.ENTRY}: there is no gallery, and gallery_reason is empty"
        return
    if not path.is_file():
        yield f"{path}: it is missing, and {layout.ENTRY} names it"
        return
    if why := refusal(record):
        yield f"{path}: {why}; remove it"
    data = path.read_bytes()
    size = (len(gallery.columns) * gallery.side, len(gallery.images) * gallery.side)
    if (found := webp_size(data)) is None:
        yield f"{path}: it is no WebP picture"
    elif found != size:
        has, said = (f"{wide}x{high}" for wide, high in (found, size))
        yield f"{path}: it has {has} pixels, and {layout.ENTRY} says {said}"
    if hashlib.sha256(data).hexdigest() != gallery.sha256:
        yield f"{path}: it is not the picture that {layout.ENTRY} names; restore it"


def _best_known(path: Path, held: Mapping[str, Held], say: Say) -> BestKnown | None:
    if why := _unfit_of_kind(path, ".json"):
        say(f"{path}: {why}")
        return None
    found = _attempted(lambda: _model(BestKnown, _json(path), path), say)
    if found is not None and found.record not in held:
        say(f"{path}: there is no record {found.record!r} on this board")
    return found


def _advisory(path: Path, say: Say) -> Advisory | None:
    if why := _unfit_of_kind(path, ".yaml"):
        say(f"{path}: {why}")
        return None
    found = _attempted(lambda: _model(Advisory, _yaml(path), path), say)
    if found is not None and found.id != path.stem:
        say(f"{path}: its id is {found.id!r}; it must be the name of the file")
    return found


def _unfit_of_kind(path: Path, ending: str) -> str | None:
    names = (path.name,) if path.suffix == ending else (f"files that end in {ending}",)
    return next(_unfit(path, names, layout.LARGEST_FILE), None)


def _attempted(call: Callable[[], T], say: Say) -> T | None:
    """What a call returns, or nothing where it is refused, which is said."""
    try:
        return call()
    except MibenchError as error:
        say(str(error))
        return None


def _model(cls: type[M], values: Mapping[str, Json], path: Path) -> M:
    """What a file holds.

    Raises:
        BoardError: a field is missing, unknown or wrong; all of them are named.
    """
    try:
        return build(cls, values, cls.__name__.lower())
    except InvalidParamsError as error:
        raise BoardError(f"{path}: {error}") from error


def _json(path: Path) -> dict[str, Json]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BoardError(f"{path}: it cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise BoardError(f"{path}: it holds no fields")
    return values


def _yaml(path: Path) -> Mapping[str, Json]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BoardError(f"{path}: it cannot be read ({error})") from error
    found = read_marked(text)  # without aliases: ten of ten of ten fill the memory
    if found.problems:
        told = "; ".join(f"line {line}: {what}" for line, what in found.problems[:5])
        raise BoardError(f"{path}: {told}")
    if not isinstance(found.values, dict):
        raise BoardError(f"{path}: it holds no fields")
    return found.values


# --- adding --------------------------------------------------------------------------------------


def add(
    run: Path,
    root: Path,
    origin: Origin | None = None,
    claims: Mapping[str, float] | None = None,
    *,
    data_root: Path | None = None,
    store: ArtifactStore | None = None,
) -> Entry:
    """Puts a finished run on the leaderboard.

    A record that is there already stays as it is. Images of the data set lift an entry to
    `Level.RESCORED`, where what is there holds, and give it a gallery, where one may be shown.

    Args:
        run: the folder that a run has written.
        root: of a version; it is made where there is none.
        origin: who made it.
        claims: numbers that its authors give themselves.
        data_root: folder of datasets in the hub's layout; without it scores are not computed again.
        store: cache of images, judges and weights.

    Returns:
        The entry as it is now.

    Raises:
        BoardError: a check has failed.
        MibenchError: the run cannot be read, or nothing can be written.
    """
    from mibench.artifacts import ArtifactStore
    from mibench.board.rescoring import rescored
    from mibench.checks.record import check_run

    store = ArtifactStore() if store is None else store
    record = read_record(run)
    procedural = record.data is not None and record.data.dataset == "procedural"
    at_hand = procedural or data_root is not None
    if layout.record_folder(root, record.id).exists():
        entry = read_entry(root, record.id)
        if entry.gallery is None and at_hand:
            entry = _with_gallery(root, entry, _drawn(run, record, data_root, store))
    else:
        lines = check_lines(check_run(run))
        failed = [f"{one.check}: {one.found}" for one in lines if one.verdict == "failed"]
        if failed:
            raise BoardError(f"{run} is not put on the leaderboard: {'; '.join(failed)}")
        drawn = _drawn(run, record, data_root, store)
        entry = Entry(
            record=record.id,
            origin=origin or Origin(),
            claims=dict(claims or {}),
            gallery=None if isinstance(drawn, str) else drawn[1],
            gallery_reason=drawn if isinstance(drawn, str) else None,
            verifications=[verification(Level.CLAIMED, lines)],
        )
        _put(run, root, record, entry, None if isinstance(drawn, str) else drawn[0])
    # A rerun of parts would import foreign code here; `mibench submission verify` has its own way.
    foreign = any(one.location is not None for one in (record.defense, record.attack))
    submitted = foreign or entry.origin.kind == "submission"
    if entry.level is Level.CLAIMED and at_hand and not submitted:
        entry = verified(root, record.id, rescored(run, record, store, data_root))
    return entry


def verified(root: Path, record: str, verification: Verification) -> Entry:
    """Adds a verification to an entry; one that is there already is not added again.

    Raises:
        BoardError: there is no such record.
        StorageError: it cannot be written.
    """
    entry = read_entry(root, record)
    if verification in entry.verifications:
        return entry
    verifications = [*entry.verifications, verification]
    return _write(root, entry.model_copy(update={"verifications": verifications}))


def verification(level: Level, checks: list[CheckLine], **more: object) -> Verification:
    """A verification of today by this mibench; ``more`` are further fields of it."""
    today = datetime.now(UTC).date().isoformat()
    values = {"level": level, "date": today, "version": __version__, "checks": checks, **more}
    return Verification.model_validate(values)


def check_lines(findings: list[Finding]) -> list[CheckLine]:
    """Findings of `mibench check` as an entry keeps them."""
    return [
        CheckLine(check=one.check, verdict=one.verdict.value, found=one.found) for one in findings
    ]


def _drawn(
    run: Path, record: Record, data_root: Path | None, store: ArtifactStore
) -> tuple[bytes, Gallery] | str:
    """The picture of some reconstructions, or why there is none."""
    from mibench.board import gallery
    from mibench.checks.record_numbers import attacked_images
    from mibench.checks.record_run import Run

    images = attacked_images(Run(run, record, None, None, data_root, store.root))
    return gallery.draw(run, record, None if isinstance(images, str) else images.numpy())


def _with_gallery(root: Path, entry: Entry, drawn: tuple[bytes, Gallery] | str) -> Entry:
    """Adds the picture that an entry lacks; the entry is written last."""
    if isinstance(drawn, str):
        return entry
    folder = layout.record_folder(root, entry.record)
    write_atomically(folder / layout.GALLERY, drawn[0])
    return _write(root, entry.model_copy(update={"gallery": drawn[1], "gallery_reason": None}))


def _write(root: Path, entry: Entry) -> Entry:
    path = layout.record_folder(root, entry.record) / layout.ENTRY
    write_atomically(path, pretty_json(entry.model_dump(mode="json")))
    return entry


def _put(run: Path, root: Path, record: Record, entry: Entry, picture: bytes | None) -> None:
    """Writes the folder of a record; it appears whole or not at all."""
    files = {
        RECORD: (run / RECORD).read_bytes(),
        PER_IMAGE: (run / PER_IMAGE).read_bytes(),
        layout.ENTRY: pretty_json(entry.model_dump(mode="json")),
    }
    if picture is not None:
        files[layout.GALLERY] = picture
    large = [f"{name} has {len(data):,} bytes" for name, data in files.items()
             if len(data) > _most(name)]  # fmt: skip
    if large:
        raise BoardError(f"{run} is not put on the leaderboard: {', '.join(large)}, too many")
    write_folder(layout.record_folder(root, record.id), files)
