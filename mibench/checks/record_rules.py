"""Checks of a record against its protocol: rank, adversary, calibration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mibench.checks.base import Verdict
from mibench.checks.record_run import Problem, Run
from mibench.data.near import tolerated
from mibench.errors import MibenchError
from mibench.evaluate import OVER_BUDGET, component_of
from mibench.files import canonical_json
from mibench.job import SUITE
from mibench.params import build
from mibench.protocol import ROLES, Protocol, load_protocol, released
from mibench.record import Calibration, Component
from mibench.registry import Registry, attacks, backbones, defenses
from mibench.strike import settled

BY_HAND = "set by hand"
"""Last words of the deviation of a parameter that is not the protocol's."""


def protocol_of(run: Run) -> Protocol | None:
    """The protocol as the record describes it; None where its values make none."""
    try:
        return build(Protocol, {**run.record.protocol.values, "title": ""}, "the record's protocol")
    except MibenchError:
        return None


def _released(run: Run) -> Protocol | None:
    """The released protocol that the record follows to the letter, if it does."""
    named = run.record.protocol
    if named.id not in released():
        return None
    found = load_protocol(named.id)
    return found if found.content_id == named.content else None


# --- rank ----------------------------------------------------------------------------------------


def ranked(run: Run) -> Iterator[Problem]:
    """The protocol is what it is called, and the rank follows from all departures."""
    record, named = run.record, run.record.protocol
    protocol = protocol_of(run)
    if protocol is None:
        if record.format_version > 1:
            yield Problem("the values of the protocol are those of no protocol")
    else:
        for what, said, right in (
            ("id", named.id, protocol.id),
            ("track", named.track, protocol.track),
            ("content id", named.content, protocol.content_id),
        ):
            if said != right:
                yield Problem(f"the protocol's {what} is {said!r}, but its values give {right!r}")
    departures = list(_departures(run, protocol))
    told = record.deviations
    for kind, text in departures:
        if not any(kind in line for line in told):
            yield Problem(f"{text}, and the deviations do not say so")
    weak = any(entry.calibrated is False for entry in record.calibration)
    fit = protocol is not None and named.id in released()
    fit = fit and _released(run) is not None and named.track in ("lite", "standard")
    entitled = fit and not departures and not told and not weak
    if named.ranked != entitled:
        why = "its protocol, deviations and calibration say so"
        yield Problem(f"ranked is {named.ranked}, but should be {entitled}: {why}")
    yield from _code(run)
    yield from _near(run)


def _departures(run: Run, protocol: Protocol | None) -> Iterator[tuple[str, str]]:
    """What a record of this run must tell: a word of the line, and the line."""
    record, named = run.record, run.record.protocol
    if named.id in released() and _released(run) is None:
        yield "differs from the released", f"the content is not that of the released {named.id}"
    if protocol is None:
        return
    if _released(run) is not None:
        # What the content id does not see: metrics and judge.
        for key in protocol.changes:
            text = f"{key} differs from the released {named.id}"
            yield text, text
    wanted = protocol.backbone
    if record.backbone.name != wanted.name:
        text = f"the backbone is {record.backbone.name}, not the protocol's {wanted.name}"
        yield "backbone", text
    if record.seed not in protocol.seeds:
        yield "none of the protocol's", f"seed {record.seed} is none of {list(protocol.seeds)}"
    names = list(record.attack.params) if record.attack.name == SUITE else [record.attack.name]
    for name in names:
        if name not in protocol.attacks:
            yield "is none of the protocol's", f"attack {name} is none of the protocol's"
    yield from _by_hand(record.attack, protocol)
    if record.adversary is not None and record.adversary.coalitions:
        yield "coalition", "the screening did not choose the coalition alone"
    limit = protocol.max_client_flops
    if limit is not None and record.cost is not None and record.cost.client_flops > limit:
        yield OVER_BUDGET, f"the client needs {record.cost.client_flops} FLOPs of {limit}"
    for score in record.scores:
        meant = protocol.metrics.get(score.metric)
        if meant is None:
            yield f"metric {score.metric}", f"metric {score.metric} is none of the protocol's"
        elif meant != score.version:
            yield f"metric {score.metric}", f"metric {score.metric} is version {score.version}"
    for name in protocol.metrics:
        if name not in {score.metric for score in record.scores}:
            yield f"metric {name}", f"metric {name} of the protocol is missing"
    for role in ROLES:
        meant_id = getattr(protocol.data, role).identity
        found = record.data.identities.get(role) if record.data is not None else None
        if meant_id is not None and meant_id != found:
            yield f"the role {role!r}", f"the images of the role {role!r} are not the protocol's"


def _by_hand(attack: Component, protocol: Protocol) -> Iterator[tuple[str, str]]:
    """Parameters of built-in attacks that are not those of the protocol."""
    several = attack.name == SUITE
    for name in attack.params if several else [attack.name]:
        if not _is_built_in(attacks, name):
            continue
        given = attack.params[name] if several else attack.params
        method = attacks.load(name)
        try:
            meant = build(method.Params, protocol.attacks.get(name, {}), f"attack {name}")
        except MibenchError:
            continue
        wanted = meant.model_dump(mode="json")
        for key in sorted({*wanted, *given} if isinstance(given, dict) else wanted):
            had = given.get(key) if isinstance(given, dict) else None
            if canonical_json(had) != canonical_json(wanted.get(key)):
                root = name if several else "attack"
                yield f"{root}.{key} {BY_HAND}", f"{root}.{key} is {had!r}, not {wanted.get(key)!r}"


def _code(run: Run) -> Iterator[Problem]:
    """Components whose code is not the installed one; results may differ, and need not."""
    record = run.record
    parts: list[tuple[str, Registry[Any], Component]] = [
        ("defense", defenses, record.defense),
        ("backbone", backbones, record.backbone),
    ]
    if record.attack.name != SUITE:
        parts.append(("attack", attacks, record.attack))
    for kind, registry, part in parts:
        if not _is_built_in(registry, part.name):
            yield Problem(
                f"{kind} {part.name} does not come with mibench: read its code", Verdict.WARNED
            )
            continue
        try:
            installed = component_of(registry.load(part.name), part.name, part.params)
        except MibenchError as error:
            yield Problem(f"{kind} {part.name}: {error}", Verdict.WARNED)
            continue
        if installed.code != part.code or installed.version != part.version:
            yield Problem(
                f"{kind} {part.name} is version {part.version} with code {part.code}, and "
                f"installed is version {installed.version} with {installed.code}",
                Verdict.WARNED,
            )
        if canonical_json(installed.params) != canonical_json(part.params):
            yield Problem(f"{kind} {part.name} has other parameters than its defaults fill in")


def _near(run: Run) -> Iterator[Problem]:
    attacked = run.record.data.images.get("attacked", 0) if run.record.data else 0
    for role, count in run.record.near_copies.items():
        if count > tolerated(attacked):
            yield Problem(
                f"the role {role!r} holds near copies of {count} of {attacked} attacked images"
            )


def _is_built_in(registry: Registry[Any], name: str) -> bool:
    return any(e.name == name and e.origin == "mibench" for e in registry.entries())


# --- adversary -----------------------------------------------------------------------------------


def adversary(run: Run) -> Iterator[Problem]:
    """Who attacked is whom the protocol lets attack."""
    facts, protocol = run.record.adversary, protocol_of(run)
    if facts is None or protocol is None:
        return
    rule = protocol.adversary
    for what, said, right in (
        ("knowledge", facts.knowledge, str(rule.knowledge)),
        ("transmissions", facts.transmissions, rule.transmissions),
        ("auxiliary", facts.auxiliary, rule.auxiliary),
    ):
        if said != right:
            yield Problem(f"the adversary's {what} is {said!r}, not the protocol's {right!r}")
    servers = len(run.record.cost.values_per_server) if run.record.cost else 0
    together = min(rule.coalition, servers)
    for coalition in [facts.corrupted, *facts.coalitions]:
        if len(coalition) != together:
            yield Problem(f"the adversary reads {len(coalition)} servers, not {together}")
        if len(set(coalition)) < len(coalition) or not set(coalition) <= set(range(servers)):
            yield Problem(f"the adversary reads {coalition}, and there are {servers} servers")
    if facts.screening and len(facts.coalitions) != 1:
        worst = min(facts.screening, key=facts.screening.__getitem__)
        if worst != "+".join(map(str, facts.corrupted)):
            yield Problem(f"server {worst} leaks most, and {facts.corrupted} were attacked")
    if together < servers and not facts.screening:
        yield Problem(f"{together} of {servers} servers were attacked without a screening")
    granted = rule.knowledge
    names = (
        list(run.record.attack.params)
        if run.record.attack.name == SUITE
        else [run.record.attack.name]
    )
    for name in names:
        if _is_built_in(attacks, name) and not granted.grants(attacks.load(name).knowledge):
            yield Problem(f"attack {name} needs more than {granted} knowledge")


# --- calibration ---------------------------------------------------------------------------------


def calibration(run: Run) -> Iterator[Problem]:
    """How strong an attack is follows from what it reached, and from the released reference."""
    record = run.record
    protocol = _released(run)
    references = protocol.references if protocol is not None else {}
    undefended = next((s.value for s in record.undefended if s.metric == "psnr"), None)
    entries = {entry.attack: entry for entry in record.calibration}
    suite = record.attack.name == SUITE
    # Every coalition meets the same undefended split.
    parts = [part.attack.partition("@")[0] for part in record.suite if part.scores]
    wanted = list(dict.fromkeys(parts)) if suite else [record.attack.name]
    for name in wanted:
        if undefended is None:
            break
        if name not in entries and not any(name in key for key in entries):
            yield Problem(f"the calibration of {name} is missing, and its PSNR is known")
    for entry in record.calibration:
        yield from _one_calibration(
            entry, None if suite else undefended, references.get(entry.attack)
        )
        if entry.reference is None and record.protocol.track in ("lite", "standard"):
            text = f"no reference says how strong {entry.attack} should be"
            yield Problem(text, Verdict.WARNED)
        if entry.calibrated is False:
            yield Problem(
                f"{entry.attack} reached {entry.reached:.2f} dB of {entry.reference} dB: it is "
                "marked as weak, and the run is not ranked",
                Verdict.WARNED,
            )
    for told in record.convergence or []:
        for key, (before, after) in told.budget.items():
            if isinstance(before, int) and after != 2 * before:
                yield Problem(f"{told.attack}: {key} was {before} and then {after}, not twice that")
        right = settled(told.gained) if told.budget else True
        if told.converged != right:
            yield Problem(
                f"{told.attack}: converged is {told.converged}, but its gains say {right}"
            )
        elif told.converged is False:
            yield Problem(f"{told.attack} has not converged and is marked so", Verdict.WARNED)


def _one_calibration(
    entry: Calibration, reached: float | None, reference: float | None
) -> Iterator[Problem]:
    if reached is not None and abs(entry.reached - reached) > 1e-9:
        yield Problem(
            f"{entry.attack} is said to have reached {entry.reached:.4f} dB, but its mean PSNR on "
            f"the undefended split is {reached:.4f} dB"
        )
    if entry.reference != reference:
        yield Problem(
            f"{entry.attack} is held against {entry.reference} dB, and the protocol's reference is "
            f"{reference}"
        )
    right = None if reference is None else entry.reached >= reference
    if entry.calibrated != right:
        yield Problem(
            f"{entry.attack} is marked calibrated={entry.calibrated}, but {entry.reached:.2f} dB "
            f"against a reference of {reference} give {right}"
        )
