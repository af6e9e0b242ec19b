"""Stored reconstructions scored anew, with the metrics of today.

The images of a run and those of its controls lie in its folder; originals and what else is needed
come from the data. The old record stays as it is, and the new one names it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mibench.artifacts import ArtifactStore
from mibench.controls import blind_guesses
from mibench.data.roles import Roles, load_roles
from mibench.errors import DataError, RecordError
from mibench.evaluate import Result, data_facts
from mibench.exhibit import Case, open_case
from mibench.files import Json
from mibench.job import UNDEFENDED as BARE
from mibench.outputs import (
    GUESSES,
    PERMUTED,
    PRIOR_SAMPLE,
    RECONSTRUCTIONS,
    UNDEFENDED,
)
from mibench.protocol import Protocol, load_protocol, released
from mibench.provenance import PACKAGES, package_version, revision
from mibench.record import FORMAT, PLACES, Calibration, Record, Score, SuitePart, read_record
from mibench.registry import metrics
from mibench.reproduce import manifest_of, protocol_of, values_beside
from mibench.scoring import Scores, leakage_scores, score_sets, summed_up, unavailable
from mibench.stored import from_png
from mibench.strike import Images, Judged, interval_seed, judged, worst_judged
from mibench.verdict import data_differences

NOT_STORED = (
    "the run was made before the images of its controls were stored, and a score without its "
    "controls is no score; run it again"
)


@dataclass(frozen=True)
class Rescored:
    """A run scored anew.

    Attributes:
        result: with the new record, ready to be written.
        computed: metrics computed from images, with the greatest change of any value of any image;
            None where the metric had no values before.
        kept: metrics of unchanged version whose values were kept, since images are missing.
        refused: metrics without a value now, with the reason.
    """

    result: Result
    computed: dict[str, float | None]
    kept: list[str]
    refused: dict[str, str]


def rescore(
    folder: Path, store: ArtifactStore, data_root: Path | None, device: str = "cpu"
) -> Rescored:
    """Scores what lies in a run's folder with the present versions of the protocol's metrics.

    Args:
        folder: of a run that succeeded.
        store: cache; the judge is taken from there, or trained and put there.
        data_root: folder of datasets in the hub's layout, or None for the hub.
        device: a PyTorch device.

    Raises:
        RecordError: the record is broken, or contradicts itself or the files beside it.
        DataError: reconstructions are missing, unreadable or of another size, or the data are not
            those of the record.
    """
    record = _finished(folder)
    protocol = _present(protocol_of(record))
    torch.set_num_threads(protocol.threads)
    roles = load_roles(protocol.data, data_root, store.root)
    refuse_other_data(record, protocol, roles)
    case = open_case(protocol, roles, store, device)
    return _rescored(folder, record, protocol, roles, case, device)


def _present(protocol: Protocol) -> Protocol:
    """The protocol with the metrics and the judge that it has today, if it is a released one."""
    if protocol.id not in released():
        return protocol
    today = load_protocol(protocol.id)
    return today if today.content_id == protocol.content_id else protocol


def _finished(folder: Path) -> Record:
    record = read_record(folder)
    if record.status != "success":
        raise RecordError(f"{folder}: the record says {record.status!r}, so there is no result yet")
    if record.data is None:
        raise RecordError(
            f"{folder}: a record of format {record.format_version} does not say which images it "
            "is about; run it again"
        )
    return record


def _rescored(
    folder: Path, record: Record, protocol: Protocol, roles: Roles, case: Case, device: str
) -> Rescored:
    changed, table = values_beside(record, folder)
    if changed:
        raise RecordError(f"{folder}: {changed[0].text}; restore it first")
    if table is None:
        raise RecordError(f"{folder} has no per_image.parquet; a rescored run keeps some of it")
    if list(table["sha256"]) != roles.attacked.hashes():
        raise RecordError(f"{folder}/per_image.parquet does not list the attacked images")
    seed, names = interval_seed(record.seed), tuple(protocol.metrics)
    parts = _parts(folder, record, protocol, roles, case, device)
    shown = read_images(folder, RECONSTRUCTIONS, len(roles.attacked), record)
    images: Images | None = None
    controls: dict[str, Tensor] = {}
    suite = record.suite
    if parts and all(one.result.controls for one in parts.values()):
        results = {name: one.result for name, one in parts.items()}
        found, controls, suite = _together(record, results, names, case, seed)
    elif not parts and PERMUTED in record.files:
        images = _stored(folder, record, shown, roles)
        found, controls = judged(names, images, case, seed), images.controls()
    else:
        found = _kept(record, table, names, seed)
    kept = [] if controls else list(found.scores.per_image)
    refused = {} if controls else {name: NOT_STORED for name in names if name not in kept}
    sets = {"attack": shown} if images is None else images.sets()
    new = _record(record, found, suite, protocol, {"kept": kept, "refused": refused})
    if controls:
        whole = score_sets(sets, case.attacked.originals, seed, device)
        new = new.model_copy(update={"distribution": whole, "judge": case.judge})
    columns = _columns(found) | {
        f"{name}_{metric}": one.result.per_image[metric]
        for name, one in parts.items()
        for metric in names
        if metric in one.result.per_image
    }
    if "correct" in table:
        columns["correct"] = torch.tensor(table["correct"].to_numpy(np.float64))
    greatest = {name: _greatest(table, columns, name) for name in found.scores.per_image}
    return Rescored(
        result=Result(
            record=new,
            manifest=roles.private.hashes(),
            task=roles.task,
            originals=roles.attacked,
            reconstructions=shown,
            controls=controls,
            per_image=columns,
            parts={name: one.result for name, one in parts.items()},
            undefended=None if images is None else images.undefended,
        ),
        computed={name: value for name, value in greatest.items() if name not in kept},
        kept=kept,
        refused=refused,
    )


def _parts(
    folder: Path, record: Record, protocol: Protocol, roles: Roles, case: Case, device: str
) -> dict[str, Rescored]:
    """The attacks of a suite, each from its own folder."""
    found = {}
    for part in record.suite:
        if not part.scores:
            continue
        place = folder / part.attack
        if place.parent.resolve() != folder.resolve() or not place.is_dir():
            raise RecordError(f"{folder} has no folder {part.attack!r} of the suite's attack")
        one = _finished(place)
        other = protocol_of(one).content_id != protocol.content_id
        if one.manifest != record.manifest or one.suite or other:
            raise RecordError(f"{place} holds another run than a part of {folder}")
        found[part.attack] = _rescored(place, one, protocol, roles, case, device)
    return found


def read_images(folder: Path, kind: str, count: int, record: Record) -> Tensor:
    """Reads numbered images of a run, as (count, 3, H, W) in [0, 1].

    Raises:
        DataError: some are missing, too many, unreadable or of another size.
        RecordError: they are not those that the record was written with.
    """
    return _read(folder, kind, [f"{index:04}.png" for index in range(count)], record)


def _read(folder: Path, kind: str, names: list[str], record: Record) -> Tensor:
    place, digest, found = folder / kind, hashlib.sha256(), []
    assert record.data is not None, "a finished record has data"
    side = record.data.image_size
    there = {path.name for path in place.glob("*.png")}
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{place} lacks {len(missing)} of {len(names)} images, from {missing[0]} on; restore "
            "them, or run again"
        )
    if extra := sorted(there - set(names)):
        raise DataError(f"{place} holds {len(extra)} images too many, such as {extra[0]}")
    for name in names:
        data = (place / name).read_bytes()
        digest.update(data)
        found.append(_pixels(place / name, data, side))
    if digest.hexdigest() != record.files.get(kind):
        raise RecordError(
            f"the images in {place} are not those that the record was written with; restore them"
        )
    return torch.stack(found).float() / 255


def _pixels(path: Path, data: bytes, side: int) -> Tensor:
    try:
        return from_png(data, side)
    except ValueError as error:
        raise DataError(f"{path} {error}; restore it") from error


def _stored(folder: Path, record: Record, shown: Tensor, roles: Roles) -> Images:
    """All images of a run that has stored those of its controls."""
    count, bare = len(shown), record.defense.name == BARE
    guesses = blind_guesses(roles.auxiliary, count)
    stored = _read(folder, GUESSES, [f"{name}.png" for name in sorted(guesses)], record)
    for name, image in zip(sorted(guesses), stored, strict=True):
        if not torch.equal(guesses[name][0], image):
            raise DataError(
                f"{folder / GUESSES / name}.png is not what the auxiliary images give here"
            )
    if PRIOR_SAMPLE in record.files:
        guesses[PRIOR_SAMPLE] = read_images(folder, PRIOR_SAMPLE, count, record)
    return Images(
        reconstructions=shown,
        undefended=shown if bare else read_images(folder, UNDEFENDED, count, record),
        permuted=read_images(folder, PERMUTED, count, record),
        guesses=guesses,
    )


def _kept(record: Record, table: pd.DataFrame, names: tuple[str, ...], seed: int) -> Judged:
    """What the run itself has kept, of metrics that have not changed since."""
    places = {place: _kept_in(place, record, table, names, seed) for place in PLACES}
    return Judged(
        scores=places["scores"],
        undefended=places["undefended"],
        permuted=places["permuted"],
        floor=places["prior_only"],
    )


def _kept_in(
    place: str, record: Record, table: pd.DataFrame, names: tuple[str, ...], seed: int
) -> Scores:
    had: dict[str, Score] = {score.metric: score for score in getattr(record, place)}
    summary, per_image = [], {}
    for name in names:
        old, columns = had.get(name), [prefix + name for prefix in PLACES.values()]
        changed = old is None or old.value is None or old.version != metrics.load(name).version
        if old is None or changed or any(column not in table for column in columns):
            summary.append(unavailable(name, NOT_STORED))
            continue
        values = torch.tensor(table[PLACES[place] + name].to_numpy(np.float64))
        summary.append(summed_up(name, values, seed).model_copy(update={"source": old.source}))
        per_image[name] = values
    return Scores(summary, per_image)


def _together(
    record: Record,
    parts: Mapping[str, Result],
    names: tuple[str, ...],
    case: Case,
    seed: int,
) -> tuple[Judged, dict[str, Tensor], list[SuitePart]]:
    """The worst of the parts for each image and metric, with controls and a line for each."""
    guesses = {
        name: images
        for part in parts.values()
        for name, images in part.controls.items()
        if name != "permuted"
    }
    found = worst_judged(
        {
            name: Judged(
                scores=_of(one, "scores"),
                undefended=_of(one, "undefended"),
                permuted=_of(one, "permuted"),
                floor=_of(one, "prior_only"),
            )
            for name, one in parts.items()
        },
        guesses,
        names,
        case,
        seed,
    )
    suite = []
    for part in record.suite:
        update = {}
        if part.attack in parts:
            update = {
                "scores": parts[part.attack].record.scores,
                "share_of_worst": found.shares(part.attack),
            }
        suite.append(part.model_copy(update=update))
    controls = {name: one.controls["permuted"] for name, one in parts.items()}
    return found.judged, {"permuted": found.shown_control(controls)}, suite


def _of(result: Result, place: str) -> Scores:
    prefix, summary = PLACES[place], getattr(result.record, place)
    columns = {one.metric: prefix + one.metric for one in summary}
    values = {n: result.per_image[c] for n, c in columns.items() if c in result.per_image}
    return Scores(summary, values)


def _record(
    record: Record,
    found: Judged,
    suite: list[SuitePart],
    protocol: Protocol,
    how: dict[str, Json],
) -> Record:
    deviations = [one for one in record.deviations if not one.startswith("metric ")]
    for name, version in protocol.metrics.items():
        installed = metrics.load(name).version
        if installed != version:
            deviations.append(f"metric {name} is version {installed}, not {version}")
    calibrated = _calibration(record, found.undefended)
    weak = any(one.calibrated is False for one in calibrated)
    opened = record.model_copy(update={"format_version": FORMAT, "files": {}})
    return opened.completed(
        protocol=record.protocol.model_copy(
            update={
                "ranked": record.protocol.ranked and not deviations and not weak,
                "values": protocol.recorded(),
            }
        ),
        deviations=deviations,
        scores=found.scores.summary,
        undefended=found.undefended.summary,
        prior_only=found.floor.summary,
        permuted=found.permuted.summary,
        leakage=leakage_scores(
            found.scores, found.floor, found.undefended, interval_seed(record.seed)
        ),
        calibration=calibrated,
        suite=suite,
        supersedes=record.id,
        provenance={
            **record.provenance,
            "rescored": {
                "revision": revision(),
                "packages": {name: package_version(name) for name in PACKAGES},
                **how,
            },
        },
    )


def _calibration(record: Record, undefended: Scores) -> list[Calibration]:
    """The strength of a single attack by its new PSNR; that of several is told by each of them."""
    reached = {one.metric: one.value for one in undefended.summary}.get("psnr")
    if record.suite or reached is None:
        return record.calibration
    return [
        Calibration(
            attack=one.attack,
            reached=reached,
            reference=one.reference,
            calibrated=None if one.reference is None else reached >= one.reference,
        )
        for one in record.calibration
    ]


def _columns(found: Judged) -> dict[str, Tensor]:
    parts = {
        "scores": found.scores,
        "undefended": found.undefended,
        "permuted": found.permuted,
        "prior_only": found.floor,
    }
    columns: dict[str, Tensor] = {}
    for place, scores in parts.items():
        columns |= scores.columns(PLACES[place])
    return columns


def _greatest(table: pd.DataFrame, columns: Mapping[str, Tensor], name: str) -> float | None:
    """How far the values of a metric have moved at most, in the score and its controls."""
    both = [p + name for p in PLACES.values() if p + name in table and p + name in columns]
    changes = [np.abs(table[c].to_numpy(np.float64) - columns[c].numpy()).max() for c in both]
    return float(max(changes)) if changes else None


def refuse_other_data(record: Record, protocol: Protocol, roles: Roles) -> None:
    """Refuses images that are not those of a record.

    Raises:
        DataError: they are not; names the first difference.
    """
    seen = record.model_copy(
        update={"data": data_facts(protocol, roles), "manifest": manifest_of(roles)}
    )
    if other := list(data_differences(record, seen)):
        raise DataError(f"the data here are not those of the record: {other[0].text}")
