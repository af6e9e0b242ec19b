"""The second level of trust: scores from the images, accuracy from the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from mibench.artifacts import Artifact, ArtifactStore, Maker
from mibench.board.entries import verification
from mibench.board.model import CheckLine, Level, Verification
from mibench.checks.record_numbers import EXACT
from mibench.data.roles import load_roles
from mibench.deployment import fit
from mibench.errors import MibenchError, UnavailableError
from mibench.files import Json
from mibench.outputs import PER_IMAGE
from mibench.record import Record, Score
from mibench.reproduce import job_of, values_beside
from mibench.rescore import rescore
from mibench.scoring import utility_scores
from mibench.strike import interval_seed
from mibench.utility import answers

SAME_ACCURACY = 1e-3
"""Most that an accuracy may differ: on another machine a few answers in thousands change."""
SCORES, ACCURACY = "rescored-scores", "rescored-accuracy"


class _Ready(ArtifactStore):
    """A cache that gives out what it has, and makes nothing."""

    def fetch(self, kind: str, spec: Mapping[str, Json], make: Maker) -> Artifact:
        if not self.contains(kind, spec):
            raise UnavailableError(
                f"the trained {kind} {self.key(kind, spec)} is not in the cache {self.root}"
            )
        return super().fetch(kind, spec, make)


def rescored(
    run: Path, record: Record, store: ArtifactStore, data_root: Path | None
) -> Verification:
    """Computes scores and accuracy of a run again.

    Args:
        run: its folder.
        record: what lies in it.
        store: cache; a judge that is not there is trained, a defense is not.
        data_root: folder of datasets in the hub's layout, or None for generated images.

    Returns:
        A verification of level `Level.RESCORED` where both came out the same, else of
        `Level.CLAIMED`; ``differences`` says what is in the way.
    """
    lines = [scores_again(run, record, store, data_root)]
    lines.append(_accuracy(record, store, data_root))
    away = [one.found for one in lines if one.verdict != "passed"]
    level = Level.CLAIMED if away else Level.RESCORED
    return verification(level, lines, differences=away)


def _line(check: str, verdict: str, found: str) -> CheckLine:
    return CheckLine(check=check, verdict=verdict, found=found)


def scores_again(
    run: Path, record: Record, store: ArtifactStore, data_root: Path | None
) -> CheckLine:
    """Scores all stored images again; nothing that the record names is imported."""
    try:
        found = rescore(run, store, data_root)
        _, table = values_beside(record, run)
    except UnavailableError as error:
        return _line(SCORES, "skipped", f"scores were not computed again: {error}")
    except MibenchError as error:
        return _line(SCORES, "failed", str(error))
    assert table is not None, "rescore asks for it"
    if found.kept or found.refused:
        names = ", ".join([*found.kept, *found.refused])
        return _line(SCORES, "skipped", f"{names}: images of the controls are missing")
    ours, theirs = record.judge, found.result.record.judge
    if ours is not None and theirs is not None and ours.weights != theirs.weights:
        return _line(
            SCORES,
            "skipped",
            f"the judge here (weights {theirs.weights}) is another one than the record's "
            f"({ours.weights}), so what it recognises cannot be compared",
        )
    far, largest = [], 0
    known = {score.metric for score in record.scores if score.value is not None}
    for name, values in found.result.per_image.items():
        metric = next((one for one in known if name == one or name.endswith(f"_{one}")), None)
        if metric is None:
            continue
        if name not in table:
            return _line(SCORES, "failed", f"{PER_IMAGE} has no column {name!r}")
        change = np.abs(table[name].to_numpy(np.float64) - values.numpy()).max()
        largest += 1
        if change > EXACT.get(metric, 1e-6):
            far.append(f"{name} of an image changed by {change:.3g}")
    if far:
        return _line(SCORES, "failed", "; ".join(far[:5]))
    names = ", ".join(one.metric for one in record.scores if one.metric in known)
    return _line(SCORES, "passed", f"{largest} columns of {PER_IMAGE} are the same: {names}")


def _accuracy(record: Record, store: ArtifactStore, data_root: Path | None) -> CheckLine:
    try:
        found = list(_recomputed(record, _Ready(store.root), data_root))
    except UnavailableError as error:
        return _line(ACCURACY, "skipped", f"accuracy was not computed again: {error}")
    except MibenchError as error:
        return _line(ACCURACY, "failed", f"accuracy cannot be computed again: {error}")
    said = {score.metric: score.value for score in record.utility}
    for score in found:
        before = said.get(score.metric)
        if score.value is None or before is None or abs(score.value - before) > SAME_ACCURACY:
            text = f"{score.metric} is {before} in the record and {score.value} from the weights"
            return _line(ACCURACY, "failed", text)
    told = ", ".join(f"{one.metric} {one.value:.4f} on {one.n} images" for one in found)
    return _line(ACCURACY, "passed", f"the weights give the record's {told}")


def _recomputed(record: Record, store: ArtifactStore, data_root: Path | None) -> Iterator[Score]:
    """Accuracy of the defended model and of the undefended one."""
    job = job_of(record)
    torch.set_num_threads(job.protocol.threads)
    roles = load_roles(job.protocol.data, data_root, store.root)
    device = "cpu"
    defended = fit(job, roles, store, device)
    wanted = record.defense_facts.get("trained_weights")
    if defended.weights != wanted:
        raise UnavailableError(
            f"the weights at hand are {defended.weights}, the record's are {wanted}"
        )
    models = {"": defended, "undefended ": fit(job.undefended(), roles, store, device)}
    for prefix, model in models.items():
        told = answers(model.defense, roles.private, job.protocol.batch)
        yield from utility_scores(
            prefix, roles.task, told, roles.private.labels, interval_seed(record.seed)
        )
