"""Scores what attackers send back: the same metrics, judge and normalisation as every run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mibench.artifacts import ArtifactStore
from mibench.board import layout
from mibench.board.entries import check_lines
from mibench.board.model import BestKnown, Level, Origin
from mibench.challenge.export import Belongs
from mibench.challenge.pictures import read_reconstructions
from mibench.challenge.schema import Challenge
from mibench.challenge.suspicion import suspicions
from mibench.checks.base import Finding
from mibench.controls import permute
from mibench.data.roles import load_roles
from mibench.errors import InvalidParamsError, RecordError, StorageError
from mibench.exhibit import Case, open_case
from mibench.files import ensure_writable, pretty_json, write_atomically
from mibench.metrics.recognition import Judged
from mibench.record import PLACES, Record, Score
from mibench.registry import metrics
from mibench.reproduce import protocol_of, values_beside
from mibench.rescore import refuse_other_data
from mibench.scoring import Scores, leakage_scores, score, summed_up, unavailable
from mibench.strike import interval_seed


@dataclass(frozen=True)
class Answer:
    """Submitted reconstructions with their scores.

    Attributes:
        best: for the board.
        record: that it belongs to.
        findings: what is suspicious about the images.
    """

    best: BestKnown
    record: Record
    findings: list[Finding]

    def ahead(self) -> dict[str, float]:
        """By metric, how much more it leaks than the record's own attack; below 0 is less."""
        own = {one.metric: one.value for one in self.record.scores}
        found = {}
        for one in self.best.scores:
            before = own.get(one.metric)
            if one.value is not None and before is not None:
                change = one.value - before
                found[one.metric] = change if one.higher_is_better else -change
        return found


def score_answer(
    challenge: Challenge,
    belongs: Belongs,
    reconstructions: Path,
    origin: Origin,
    by: str,
    store: ArtifactStore,
    data_root: Path | None,
    device: str = "cpu",
) -> Answer:
    """Scores the reconstructions that answer a challenge.

    Args:
        challenge: that they answer.
        belongs: its record, with the values per image of the floor and of the undefended split.
        reconstructions: folder of the images.
        origin: whom to credit.
        by: name of the submission.
        store: cache; the judge is taken from there, or trained and put there.
        data_root: folder of datasets in the hub's layout, or None for the hub.
        device: a PyTorch device.

    Raises:
        DataError: the folder does not hold what the challenge asks for, or the originals here are
            not those of the record.
        RecordError: the record is another one than the challenge's, or its values per image are.
    """
    images, digest = read_reconstructions(reconstructions, challenge)
    record = belongs.record
    if (record.id, record.protocol.content) != (challenge.record, challenge.protocol.content):
        raise RecordError(
            f"the challenge belongs to record {challenge.record} under {challenge.protocol.id} "
            f"({challenge.protocol.content}), and this is {record.id} under {record.protocol.id} "
            f"({record.protocol.content})"
        )
    table = _table(belongs)
    protocol = protocol_of(record)
    torch.set_num_threads(protocol.threads)
    roles = load_roles(protocol.data, data_root, store.root)
    refuse_other_data(record, protocol, roles)
    case = open_case(protocol, roles, store, device)
    names, seed = [one.metric for one in record.scores], interval_seed(record.seed)
    found = score(names, images, case.attacked, seed)
    (others,) = permute((images,))
    permuted = score(names, others, case.attacked, seed)
    floor = _beside("prior_only", record, table, names, seed, case)
    undefended = _beside("undefended", record, table, names, seed, case)
    findings = suspicions(images, roles, record, found, undefended, permuted)
    best = BestKnown(
        record=record.id,
        by=by,
        origin=origin,
        # Whose images these are, nobody can tell: only code that is run again can go higher.
        level=Level.RESCORED,
        scores=found.summary,
        permuted=permuted.summary,
        leakage=_leakage(found, floor, undefended, seed),
        challenge=challenge.id,
        reconstructions=digest,
        checks=check_lines(findings),
    )
    return Answer(best, record, findings)


def place_of(root: Path, name: str) -> Path:
    """Returns where the answer of this name belongs.

    Raises:
        InvalidParamsError: the name is not plain.
        StorageError: the board holds one of this name.
    """
    plain = name.replace("-", "").replace("_", "").replace(".", "")
    if not (plain.isascii() and plain.isalnum()) or name.startswith((".", "-")):
        raise InvalidParamsError(
            f"--name {name!r}: letters, digits, and - _ . inside, such as better-decoder"
        )
    path = layout.best_known(root) / f"{name}.json"
    if path.exists():
        raise StorageError(f"{path} is there already; choose another --name, or remove it first")
    return path


def write_answer(answer: Answer, path: Path) -> None:
    """Writes what the board shows of an answer.

    Raises:
        StorageError: it cannot be written.
    """
    ensure_writable(path.parent)
    write_atomically(path, pretty_json(answer.best.model_dump(mode="json")))


def _table(belongs: Belongs) -> pd.DataFrame:
    changed, table = values_beside(belongs.record, belongs.folder)
    if changed:
        raise RecordError(f"{belongs.folder}: {changed[0].text}; restore it first")
    if table is None:
        raise RecordError(
            f"{belongs.folder} has no per_image.parquet: leakage cannot be normalised without the "
            "values of its floor and its undefended split"
        )
    return table


def _beside(
    place: str, record: Record, table: pd.DataFrame, names: Sequence[str], seed: int, case: Case
) -> Scores:
    """What the record has of a control, for those metrics that mean the same here."""
    had: dict[str, Score] = {one.metric: one for one in getattr(record, place)}
    summary, per_image = [], {}
    for name in names:
        reason = _other(had[name], record, case)
        column = PLACES[place] + name
        if reason is None and column not in table:
            reason = f"the record has no values per image of {column}"
        if reason is not None:
            summary.append(unavailable(name, reason))
            continue
        values = torch.tensor(table[column].to_numpy(np.float64))
        summary.append(summed_up(name, values, seed))
        per_image[name] = values
    return Scores(summary, per_image)


def _other(had: Score, record: Record, case: Case) -> str | None:
    """Why a number of the record cannot be compared with one that is computed here, if so."""
    method = metrics.load(had.metric)
    if had.value is None:
        return had.reason
    if had.version != method.version:
        return f"the record has version {had.version} of it, and here is {method.version}"
    if issubclass(method, Judged):
        theirs = None if record.judge is None else record.judge.weights
        ours = None if case.judge is None else case.judge.weights
        if theirs != ours:
            return f"the record's judge was another one ({theirs}) than the one here ({ours})"
    return None


def _leakage(found: Scores, floor: Scores, undefended: Scores, seed: int) -> list[Score]:
    """Normalised leakage; null, with the reason, where the record has nothing to normalise by."""
    missing = {
        one.metric: one.reason or ""
        for part in (undefended, floor)
        for one in part.summary
        if one.value is None
    }
    known: dict[str, Tensor] = {k: v for k, v in found.per_image.items() if k not in missing}
    summary = [
        unavailable(one.metric, missing[one.metric])
        if one.metric in missing and one.value is not None
        else one
        for one in found.summary
    ]
    return leakage_scores(Scores(summary, known), floor, undefended, seed)
