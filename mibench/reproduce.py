"""A record run again, from its own content alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import JsonValue

from mibench.artifacts import ArtifactStore
from mibench.data.roles import Roles, load_roles
from mibench.errors import MibenchError, PluginError, RecordError, UnknownNameError
from mibench.evaluate import data_facts, evaluate, manifest_text, open_record
from mibench.files import Json, canonical_json, pretty_json, write_atomically
from mibench.job import EVERY_COALITION, SUITE, WEIGHTS_BY_HAND, Job
from mibench.outputs import MANIFEST, PER_IMAGE, write_result
from mibench.params import build
from mibench.protocol import Protocol, load_protocol, released
from mibench.record import CONTROLLED, PLACES, Component, Record
from mibench.registry import Registry, attacks, defenses, metrics
from mibench.verdict import Difference, Verdict, compare, data_differences

VERDICT = "verdict.json"


def reproduce(
    record: Record,
    folder: Path,
    out: Path,
    store: ArtifactStore,
    data_root: Path | None,
    device: str,
    seed: int | None = None,
) -> Verdict:
    """Runs a record again and compares.

    Nothing is trained where the data are others already: that says where it differs.

    Args:
        record: of a run that succeeded.
        folder: where it lies; values per image are read there, if they are the record's own.
        out: folder of the rerun, with a record of its own and the verdict.
        store: cache of trained parts.
        data_root: folder of datasets in the hub's layout, or None for the hub.
        device: a PyTorch device.
        seed: another seed than the record's.

    Raises:
        RecordError: the record does not hold what a rerun needs, or was edited so that it
            contradicts itself.
        MibenchError: what it names is not here.
    """
    job = job_of(record, seed)
    opened = open_record(job, device)
    refuse_other_plugins(record, opened)
    roles = load_roles(job.protocol.data, data_root, store.root)
    seen = opened.model_copy(
        update={"data": data_facts(job.protocol, roles), "manifest": manifest_of(roles)}
    )
    if other := list(data_differences(record, seen)):
        return Verdict("different", other, [])
    edited, old = values_beside(record, folder)
    rerun = write_result(evaluate(job, store, data_root, device), out)
    verdict = compare(record, old, rerun, pd.read_parquet(out / PER_IMAGE))
    if edited:
        verdict = replace(verdict, word="different", differences=[*edited, *verdict.differences])
    write_atomically(out / VERDICT, pretty_json(_described(verdict)))
    return verdict


def job_of(record: Record, seed: int | None = None) -> Job:
    """Rebuilds what was run from a record's own content.

    Args:
        record: of a run that succeeded.
        seed: another seed than the record's.

    Raises:
        RecordError: the run did not succeed, its weights were given by hand, or the record
            contradicts itself.
        MibenchError: a component or parameter is not known here.
    """
    if record.status != "success":
        raise RecordError(
            f"the record says {record.status!r}: a run that did not finish has no result to "
            "compare; finish it with `mibench run` first"
        )
    by_hand = [one for one in record.deviations if one.startswith(WEIGHTS_BY_HAND)]
    if by_hand:
        raise RecordError(
            f"{by_hand[0]}: a rerun would train other weights than these; give them to "
            "`mibench run --weights` instead"
        )
    protocol = protocol_of(record)
    coalitions = [] if record.adversary is None else record.adversary.coalitions
    every = EVERY_COALITION in record.deviations
    suite = record.attack.name == SUITE
    return Job(
        protocol=protocol,
        defense=_loaded_by(defenses, record.defense),
        attack=SUITE if suite else _loaded_by(attacks, record.attack),
        defense_params=record.defense.params,
        attack_params=_suite_params(record, protocol)
        if suite
        else _set_by_hand(record.attack, protocol),
        seed=record.seed if seed is None else seed,
        converge=record.convergence is not None,
        every_coalition=every,
        coalition=None if every or not coalitions else tuple(coalitions[0]),
    )


def protocol_of(record: Record) -> Protocol:
    """Rebuilds the protocol of a record: from its values, in format 1 from the released one.

    Raises:
        RecordError: the values are not those of the protocol that the record names.
        InvalidParamsError: they are no protocol of this version.
    """
    named = record.protocol
    if not named.values:
        if named.id in released() and load_protocol(named.id).content_id == named.content:
            return load_protocol(named.id)
        raise RecordError(
            f"a record of format {record.format_version} does not hold its protocol's values, and "
            f"no released protocol is {named.id} with content {named.content}; run it again with "
            "the mibench that wrote it"
        )
    known: dict[str, Json] = {
        "title": load_protocol(named.id).title if named.id in released() else f"of {named.id}",
        "references": {
            one.attack: one.reference for one in record.calibration if one.reference is not None
        },
    }
    if isinstance(rules := named.values.get("attacks"), dict):
        # A record sorts its keys, and the code of a suite is told in the protocol's order.
        order = dict.fromkeys([part.attack for part in record.suite if part.attack in rules])
        known["attacks"] = {name: rules[name] for name in (order | rules)}
    found = build(Protocol, {**named.values, **known}, "the protocol in the record")
    # What the content id sees has changed before, so that of an older format may be another.
    edited = found.content_id != named.content and record.format_version >= CONTROLLED
    if found.id != named.id or found.track != named.track or edited:
        raise RecordError(
            f"the record names protocol {named.id} ({named.track}, content {named.content}), but "
            f"the values in it are those of {found.id} ({found.track}, content "
            f"{found.content_id}); it was edited"
        )
    return found


def values_beside(record: Record, folder: Path) -> tuple[list[Difference], pd.DataFrame | None]:
    """Reads the values per image that lie beside a record.

    Returns:
        What was changed since the record was written, and the values; None where there are none.

    Raises:
        RecordError: they cannot be read.
    """
    found = []
    for name in (PER_IMAGE, MANIFEST):
        path = folder / name
        if path.is_file() and name in record.files:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            if digest != record.files[name]:
                text = f"{name} is not the file that the record was written with"
                found.append(Difference("record", text))
    path = folder / PER_IMAGE
    if not path.is_file():
        return found, None
    try:
        return found, _table(path)
    except Exception as error:
        line = " ".join(str(error).split())
        raise RecordError(
            f"{path} cannot be read ({line}); restore it, or take it away: means are then compared "
            "without it"
        ) from error


def _table(path: Path) -> pd.DataFrame:
    """Values per image: a hash in each row, and numbers in all columns of metrics."""
    found = pd.read_parquet(path)
    if "sha256" not in found:
        raise ValueError("it has no column 'sha256'")
    known = {name for score in metrics.names() for name in (p + score for p in PLACES.values())}
    for name in known & set(found.columns):
        if not pd.api.types.is_numeric_dtype(found[name]):
            raise ValueError(f"its column {name!r} holds no numbers")
    return found


def manifest_of(roles: Roles) -> str:
    """The hash over the hashes of all private images, as a record has it."""
    return hashlib.sha256(manifest_text(roles.private.hashes())).hexdigest()


def refuse_other_plugins(record: Record, opened: Record) -> None:
    """Refuses a plugin file that is not the one of the record.

    Raises:
        PluginError: its code has changed.
    """
    for kind in ("defense", "attack"):
        had: Component = getattr(record, kind)
        has: Component = getattr(opened, kind)
        if had.location is not None and had.code != has.code:
            raise PluginError(
                f"{had.location} is not the {kind} of the record: its code is {has.code}, the "
                f"record's {had.code}; restore that file, or run this one with `mibench run`"
            )


def _loaded_by(registry: Registry[Any], part: Component) -> str:
    """The name or location that a component of a record is loaded by."""
    name = part.location or part.name
    try:
        registry.load(name)
    except UnknownNameError as error:
        raise UnknownNameError(
            f"{error}; the record does not say in which file {registry.kind} {part.name} was"
        ) from error
    except PluginError as error:
        raise PluginError(f"{error}; the record was made with {registry.kind} {name}") from error
    return name


def _set_by_hand(part: Component, protocol: Protocol) -> dict[str, Json]:
    """The parameters of an attack that are not those that its protocol gives it."""
    method = attacks.load(part.location or part.name)
    meant: Mapping[str, JsonValue] = {}
    try:
        below = protocol.attacks.get(part.name, {})
        meant = build(method.Params, below, f"attack {part.name}").model_dump(mode="json")
    except MibenchError:  # then all of them are
        pass
    return {
        key: value
        for key, value in part.params.items()
        if key not in meant or canonical_json(value) != canonical_json(meant[key])
    }


def _suite_params(record: Record, protocol: Protocol) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for name, params in record.attack.params.items():
        if not isinstance(params, dict) or name not in protocol.attacks:
            raise RecordError(
                f"attack.params: {name!r} is none of the attacks of protocol {protocol.id}"
            )
        part = record.attack.model_copy(update={"name": name, "params": params})
        if given := _set_by_hand(part, protocol):
            found[name] = given
    return found


def _described(verdict: Verdict) -> dict[str, Json]:
    return {
        "verdict": verdict.word,
        "first": None if verdict.first is None else str(verdict.first),
        "differences": [str(one) for one in verdict.differences],
        "scores": [asdict(row) for row in verdict.rows],
    }
