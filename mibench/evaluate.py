"""The straight way through: protocol → data → defense → target → attack → scores → record."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from mibench.artifacts import ArtifactStore
from mibench.assault import coalitions_of
from mibench.attacks.base import Attack
from mibench.data.near import count_near_copies
from mibench.data.roles import Roles, load_roles
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense
from mibench.deployment import TRAINING_SECONDS, Deployed, code_of, examine, fit
from mibench.errors import InvalidParamsError, NotApplicableError
from mibench.exhibit import open_case
from mibench.files import Json, content_id
from mibench.job import SUITE, UNDEFENDED, Job
from mibench.measuring import tell
from mibench.params import build
from mibench.protocol import ROLES, Protocol
from mibench.provenance import provenance
from mibench.record import Component, Cost, DataFacts, ProtocolId, Record
from mibench.registry import (
    attacks,
    backbones,
    defenses,
    fingerprint,
    lineage,
    package_fingerprint,
)
from mibench.scoring import attribute_scores, utility_scores
from mibench.strike import Strike, interval_seed, strike, worst_case
from mibench.task import Task
from mibench.utility import answers, cost

OVER_BUDGET = "the client needs"
"""First words of the deviation of a client that costs too much."""


@dataclass(frozen=True)
class Result:
    """A record with the images and per-image values that it rests on.

    Attributes:
        record: the finished record.
        manifest: SHA-256 of every private image, in order.
        task: what the labels mean.
        originals: the attacked images.
        reconstructions: what the attack made of them, (N, 3, H, W) in [0, 1].
        controls: images of the same shape by control.
        per_image: values (N,) by metric.
        parts: of a suite, or of every coalition, the result of each attack alone.
        undefended: what the attack made of the undefended split; None of several attacks together.
    """

    record: Record
    manifest: list[str]
    task: Task
    originals: ImageSet
    reconstructions: Tensor
    controls: dict[str, Tensor]
    per_image: dict[str, Tensor]
    parts: Mapping[str, Result] = field(default_factory=dict)
    undefended: Tensor | None = None


def evaluate(job: Job, store: ArtifactStore, data_root: Path | None, device: str) -> Result:
    """Runs one job and returns its record with everything it rests on.

    Args:
        job: what to run.
        store: cache of trained parts; what lies there is not trained again.
        data_root: folder of datasets in the hub's layout, or None for the hub.
        device: a PyTorch device, such as ``cpu`` or ``cuda``.

    Raises:
        MibenchError: bad input or a missing resource; the message says what to do.
    """
    began = time.monotonic()
    opened = open_record(job, device)
    torch.set_num_threads(job.protocol.threads)
    roles = load_roles(job.protocol.data, data_root, store.root)
    near = count_near_copies(roles, store)

    deployed = fit(job, roles, store, device)
    bare = job.defense == UNDEFENDED
    reference = deployed if bare else fit(job.undefended(), roles, store, device)

    case = open_case(job.protocol, roles, store, device)
    jobs = job.against(coalitions_of(job.protocol.adversary, deployed.defense))
    strikes: dict[str, Strike] = {}
    left_out: dict[str, str] = {}
    for name, one in jobs.items():
        try:
            strikes[name] = strike(one, deployed, reference, roles, case, store, device)
        except NotApplicableError as error:
            if len(jobs) == 1:
                raise
            left_out[name] = str(error)
    if not strikes:
        raise NotApplicableError("; ".join(left_out.values()))
    told = tell(job, deployed, next(iter(strikes.values())).adversary.worst, roles, store, device)
    told_bare = told if bare else tell(job.undefended(), reference, (0,), roles, store, device)
    model = _of_the_model(job, deployed, reference, roles)

    def result(opened: Record, struck: Strike, parts: Mapping[str, Result]) -> Result:
        weak = any(one.calibrated is False for one in struck.calibration)
        ranked = opened.protocol.ranked and not model.deviations and not weak
        record = opened.completed(
            protocol=opened.protocol.model_copy(update={"ranked": ranked}),
            deviations=opened.deviations + model.deviations,
            wall_seconds=round(time.monotonic() - began, 1),
            adversary=struck.adversary,
            scores=struck.scores.summary,
            undefended=struck.undefended.summary,
            prior_only=struck.floor.summary,
            permuted=struck.permuted_scores.summary,
            leakage=struck.leakage(interval_seed(job.seed)),
            distribution=struck.distribution,
            judge=case.judge,
            calibration=struck.calibration,
            convergence=struck.convergence,
            suite=struck.suite,
            near_copies=near,
            seconds_per_image=struck.seconds_per_image,
            attack_facts=struck.facts,
            information=told.scores,
            information_undefended=told_bare.scores,
            information_facts=told.facts,
            **model.fields,
        )
        return Result(
            record=record,
            manifest=model.manifest,
            task=roles.task,
            originals=roles.attacked,
            reconstructions=struck.reconstructions,
            controls={"permuted": struck.permuted, **struck.guesses},
            undefended=struck.undefended_images,
            per_image={**struck.columns(), "correct": model.correct[roles.chosen]},
            parts=parts,
        )

    if not job.suite and list(jobs) == [job.attack]:
        return result(opened, strikes[job.attack], {})
    parts = {
        name: result(open_record(jobs[name], device), one, {}) for name, one in strikes.items()
    }
    return result(opened, worst_case(strikes, left_out, job, case, device), parts)


@dataclass(frozen=True)
class _Model:
    """What a record says of the defended model itself, whoever attacks it."""

    fields: dict[str, object]
    deviations: list[str]
    manifest: list[str]
    correct: Tensor


def _of_the_model(job: Job, deployed: Deployed, reference: Deployed, roles: Roles) -> _Model:
    batch, task, labels = job.protocol.batch, roles.task, roles.private.labels
    seed = interval_seed(job.seed)
    told = answers(deployed.defense, roles.private, batch)
    bare = deployed is reference
    told_undefended = told if bare else answers(reference.defense, roles.private, batch)
    # For whoever chooses a defense's parameters: never choose them on private images.
    same_labels = job.protocol.adversary.auxiliary != "other"
    validated = answers(deployed.defense, roles.validation, batch) if same_labels else None
    examined = examine(deployed.defense, roles.validation) if same_labels else {}
    manifest = roles.private.hashes()
    seconds = cast("float | None", deployed.facts.get(TRAINING_SECONDS))
    spent = cost(deployed.defense, reference.defense, roles.attacked, seed, seconds)
    return _Model(
        fields={
            "data": data_facts(job.protocol, roles),
            "manifest": hashlib.sha256(manifest_text(manifest)).hexdigest(),
            "utility": [
                *utility_scores("", task, told, labels, seed),
                *utility_scores("undefended ", task, told_undefended, labels, seed),
                *utility_scores("validation ", task, validated, roles.validation.labels, seed),
            ],
            "attributes": attribute_scores(task, told, told_undefended, labels),
            "cost": spent,
            "defense_facts": {**deployed.facts, **examined},
        },
        deviations=_over_budget(job.protocol, spent) + _other_images(job.protocol, roles),
        manifest=manifest,
        correct=task.correct(told, labels),
    )


def manifest_text(hashes: list[str]) -> bytes:
    """Returns the manifest as a file: one hash per line."""
    return "".join(f"{name}\n" for name in hashes).encode()


def open_record(job: Job, device: str) -> Record:
    """Checks every name and parameter of a job and returns its record as ``started``.

    Raises:
        UnknownNameError: a name that no registry holds.
        InvalidParamsError: a parameter that its component refuses.
    """
    protocol, backbone = job.protocol, job.protocol.backbone
    for name in protocol.attacks:
        attacks.entry(name)
    granted = protocol.adversary.knowledge
    found = {}
    for one in job.single():
        method = attacks.load(one.attack)
        if not granted.grants(method.knowledge):
            raise InvalidParamsError(
                f"attack {one.attack} needs {method.knowledge} knowledge, but protocol "
                f"{protocol.id} grants {granted}; choose another attack or protocol"
            )
        if method.labels and protocol.adversary.auxiliary == "other":
            raise InvalidParamsError(
                f"attack {one.attack} learns from labels, but the attacker's images are of another "
                "dataset (adversary.auxiliary is 'other') and have none of this task; choose "
                "another attack, or auxiliary images of the protocol's own dataset"
            )
        if job.converge:
            one.doubled().budget()  # a bound that twice the budget breaks shows now, not in the end
        found[one.attack] = component_of(method, one.attack, one.merged_attack_params())
    return Record(
        status="started",
        protocol=identified(protocol, ranked=protocol.ranked and not job.deviations()),
        defense=component_of(defenses.load(job.defense), job.defense, job.defense_params),
        attack=_suite(found) if job.suite else found[job.attack],
        backbone=component_of(backbones.load(backbone.name), backbone.name, backbone.params),
        seed=job.seed,
        deviations=job.deviations(),
        convergence=[] if job.converge else None,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=provenance(device, protocol.threads),
    )


def identified(protocol: Protocol, *, ranked: bool) -> ProtocolId:
    """Returns what a record says of its protocol; ``ranked`` is whether the run may have a rank."""
    return ProtocolId(
        id=protocol.id,
        content=protocol.content_id,
        track=protocol.track,
        ranked=ranked,
        values=protocol.recorded(),
    )


def _suite(found: Mapping[str, Component]) -> Component:
    """All attacks as one, with the parameters of each."""
    return Component(
        name=SUITE,
        version=max(one.version for one in found.values()),
        code=content_id([one.code for one in found.values()]),
        params={name: one.params for name, one in found.items()},
    )


def data_facts(protocol: Protocol, roles: Roles) -> DataFacts:
    """Returns which images play the protocol's roles here."""
    sets = {name: getattr(roles, name) for name in ROLES}
    return DataFacts(
        dataset=protocol.data.dataset,
        image_size=protocol.data.image_size,
        images={name: len(one) for name, one in sets.items()}
        | {"attacked": protocol.data.attacked},
        identities={name: one.identity for name, one in sets.items()},
        left_out=roles.left_out,
    )


def component_of(cls: type, name: str, values: Mapping[str, Json]) -> Component:
    """A defense, attack or backbone with its code and with all its parameters.

    Raises:
        InvalidParamsError: a parameter that it refuses.
    """
    kind = {Defense: "defense", Attack: "attack"}
    owner = next((word for base, word in kind.items() if issubclass(cls, base)), "backbone")
    params = build(cls.Params, values, f"{owner} {name}")  # type: ignore[attr-defined]
    code = fingerprint(cls)
    if issubclass(cls, Attack):
        code = content_id([*lineage(cls), package_fingerprint("mibench.attacks")])
    if issubclass(cls, Defense):
        held = getattr(params, "of", None)
        used = [cls] if held is None else [cls, defenses.load(held)]
        code = content_id([one for method in used for one in code_of(method)])
    return Component(
        name=cls.name,  # type: ignore[attr-defined]
        version=cls.version,  # type: ignore[attr-defined]
        code=code,
        params=params.model_dump(mode="json"),
        location=name if ":" in name or name.endswith(".py") else None,
    )


def _other_images(protocol: Protocol, roles: Roles) -> list[str]:
    """Names the roles whose images are not those that the protocol means."""
    found = []
    for role in ROLES:
        meant = getattr(protocol.data, role).identity
        if meant is not None and meant != getattr(roles, role).identity:
            found.append(f"the images of the role {role!r} are not those of the protocol")
    return found


def _over_budget(protocol: Protocol, cost: Cost) -> list[str]:
    limit = protocol.max_client_flops
    if limit is None or cost.client_flops <= limit:
        return []
    return [f"{OVER_BUDGET} {cost.client_flops} FLOPs, above the protocol's {limit}"]
