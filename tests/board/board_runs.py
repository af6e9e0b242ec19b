"""Entries of a leaderboard with chosen numbers: honest arithmetic, no run.

One forged run is made once; every entry is that run with other scores, from which all that the
record says is computed again.
"""

import functools
import hashlib
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from forged_runs import ID, forge, score_of

from mibench import seeding
from mibench.board import layout
from mibench.board.model import Entry, Level, Origin, Verification
from mibench.evaluate import component_of, open_record
from mibench.files import pretty_json
from mibench.job import Job
from mibench.metrics.intervals import estimate_mean, normalised_leakage
from mibench.outputs import PER_IMAGE, RECORD
from mibench.protocol import load_protocol
from mibench.record import PLACES, Record
from mibench.registry import defenses
from mibench.scoring import spread

REASON = "no picture is drawn in this test"


@functools.cache
def base():
    """Values and table of the forged run, and its folder."""
    folder = Path(tempfile.mkdtemp(prefix="mibench-forged-"))
    forge(folder)
    values = json.loads((folder / RECORD).read_text())
    return folder, values, pd.read_parquet(folder / PER_IMAGE)


def numbers(
    *, defense="noise", params=None, attack="suite", seed=0, ssim=0.5, found=0.5, accuracy=0.75,
    undefended=0.76, scatter=0.01, started="2026-01-01T00:00:00+00:00", protocol_id=ID, flops=None,
):  # fmt: skip
    """The values of a record and its table.

    Args:
        defense: name of a built-in.
        params: of it.
        attack: ``suite``, or one attack of the protocol.
        seed: of the run.
        ssim: normalised leakage in SSIM.
        found: share of the images that are found.
        accuracy: of the defended model.
        undefended: accuracy of the undefended model.
        scatter: how far images differ in their leakage.
        started: when the run was made.
        protocol_id: of the protocol.
        flops: of the client, where it is over the budget.
    """
    _, values, table = base()
    values, table = json.loads(json.dumps(values)), table.copy()
    draws = np.random.default_rng([seed, len(defense)])
    floor, top = table["prior_only_ssim"], table["undefended_ssim"]
    noise = scatter * draws.standard_normal(len(table))
    table["ssim"] = np.minimum(floor + ssim * (top - floor) + noise - noise.mean(), 1.0)
    order = draws.permutation(len(table))
    for prefix, share in (("", found), ("undefended_", 1.0), ("permuted_", 0.0),
                          ("prior_only_", 0.0)):  # fmt: skip
        table[f"{prefix}reid-top1"] = (order < round(share * len(table))).astype(float)
    opened = open_record(
        Job(load_protocol(protocol_id), defense, attack, params or {}, {}, seed), "cpu"
    )
    values |= json.loads(opened.to_json().decode()) | {
        "status": "success", "seed": seed, "started": started, "provenance": values["provenance"],
    } | {key: values[key] for key in _KEPT}  # fmt: skip
    values["defense"] = component_of(
        defenses.load(defense), defense, params or {}
    ).model_dump(mode="json")  # fmt: skip
    for place in PLACES:
        found_score = score_of(values, place, "reid-top1")
        found_score |= {"value": 0.0, "n": len(table), "reason": None}
    score_of(values, "leakage", "leakage(reid-top1)")["value"] = 0.0
    for one in values["prior_only"]:
        if one["metric"] == "reid-top1":
            one["source"] = "mean-image"
    for name, value in (("accuracy", accuracy), ("undefended accuracy", undefended)):
        score_of(values, "utility", name).update(
            value=value, ci_low=value - 0.008, ci_high=value + 0.008, reason=None
        )
    names = list(opened.attack.params) if attack == "suite" else [attack]
    values["suite"] = []
    references = load_protocol(protocol_id).references
    values["calibration"] = [
        {"attack": name, "reference": references.get(name), "calibrated": True,
         "reached": (references.get(name) or 0) + 1}
        for name in names
    ]  # fmt: skip
    if attack != "suite":
        values["calibration"][0]["reached"] = score_of(values, "undefended", "psnr")["value"]
    if flops is not None:
        values["cost"]["client_flops"] = flops
        values["deviations"] = [f"the client needs {flops} FLOPs, above the protocol's 5000000"]
        values["protocol"]["ranked"] = False
    if attack == "suite":
        given = [one["metric"] for one in values["scores"] if one["value"] is not None]
        table = table.assign(**{f"{name}_{m}": table[m] for name in names for m in given})
        values["seconds_per_image"] = 0.001 * len(names)
        values["suite"] = [
            {"attack": name, "corrupted": [0], "scores": [], "reason": "filled in below",
             "share_of_worst": {m: 1 / len(names) for m in given}, "seconds_per_image": 0.001,
             "facts": {}}
            for name in names
        ]  # fmt: skip
    return summed(values, table)


_KEPT = (
    "data", "manifest", "adversary", *PLACES, "leakage", "utility", "judge", "information",
    "information_undefended", "distribution", "cost", "seconds_per_image",
)  # fmt: skip


def summed(values, table):
    """Writes into a record all that follows from its table."""
    draws = seeding.derive(values["seed"], "intervals")

    def column(name):
        return torch.tensor(table[name].to_numpy(np.float64))

    for place, prefix in PLACES.items():
        for one in values[place]:
            if one["value"] is not None:
                one |= _summary(column(prefix + one["metric"]), one, draws)
    for one, score in zip(values["leakage"], values["scores"], strict=True):
        if score["value"] is None:
            continue
        share = normalised_leakage(
            *(column(p + score["metric"]) for p in ("", "prior_only_", "undefended_")),
            more_leakage="higher" if score["higher_is_better"] else "lower",
            seed=draws,
        )
        one |= {"value": share.value, "ci_low": share.low, "ci_high": share.high, "n": share.n,
                "reason": share.reason}  # fmt: skip
    for part in values["suite"]:
        part["scores"], part["reason"] = [
            score | (_summary(column(f"{part['attack']}_{score['metric']}"), score, draws)
                     if score["value"] is not None else {})
            for score in values["scores"]
        ], None  # fmt: skip
    return values, table


def _summary(values, like, draws):
    way = "higher" if like["higher_is_better"] else "lower"
    return dict(_summary_of(tuple(values.tolist()), way, draws))


@functools.lru_cache(maxsize=1000)
def _summary_of(values, way, draws):
    """The attacks of a made-up suite are all alike, so that most of them are known already."""
    values = torch.tensor(values, dtype=torch.float64)
    mean = estimate_mean(values, draws)
    return {"value": mean.value, "ci_low": mean.low, "ci_high": mean.high, "n": mean.n,
            **spread(values, way)}  # fmt: skip


def put(root, values, table, *, level=Level.RESCORED, **entry):
    """Puts a record on a board without asking anybody; returns its id."""
    buffer = io.BytesIO()
    table.to_parquet(buffer, index=False)
    values = values | {
        "files": values["files"] | {PER_IMAGE: hashlib.sha256(buffer.getvalue()).hexdigest()}
    }
    record = Record.model_validate(values)
    folder = layout.record_folder(root, record.id)
    folder.mkdir(parents=True)
    (folder / RECORD).write_bytes(record.to_json())
    (folder / PER_IMAGE).write_bytes(buffer.getvalue())
    told = Entry(
        record=record.id,
        gallery_reason=REASON,
        verifications=[Verification(level=level, date="2026-01-02", version="0")],
        **entry,
    )
    (folder / layout.ENTRY).write_bytes(pretty_json(told.model_dump(mode="json")))
    return record.id


def row_on(root, *, level=Level.RESCORED, submission=None, **chosen):
    """Puts an entry with chosen numbers on a board; see `numbers`."""
    origin = Origin() if submission is None else Origin(kind="submission", submission=submission)
    return put(root, *numbers(**chosen), level=level, origin=origin)


def run_folder(folder):
    """A copy of the forged run, with its images."""
    shutil.copytree(base()[0], folder)
    return folder
