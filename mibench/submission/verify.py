"""Three levels of trust: what is checked for each, and what an entry says of it afterwards."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from mibench.artifacts import ArtifactStore, open_artifact
from mibench.board import entries, layout
from mibench.board.entries import check_lines, verification
from mibench.board.model import CheckLine, Entry, Level, Origin
from mibench.board.rescoring import scores_again
from mibench.checks import targets
from mibench.checks.base import Finding, Verdict
from mibench.checks.process import ComponentError, Nursery, isolation
from mibench.checks.record import check_run
from mibench.data.roles import load_roles
from mibench.deployment import hash_tensors
from mibench.errors import MibenchError, SubmissionError
from mibench.files import canonical_json, ensure_writable
from mibench.outputs import PER_IMAGE, WEIGHTS
from mibench.record import Component, Record, read_record
from mibench.reproduce import protocol_of, values_beside
from mibench.submission import sandbox
from mibench.submission.outside import Trained, Way, looked_at, thoroughly_attacked
from mibench.submission.schema import Submission
from mibench.submission.score import place, refuse_missing_images, run_confined
from mibench.submission.static import content_of, load
from mibench.verdict import CIRCUMSTANCES, compare

Say = Callable[[str], None]


@dataclass(frozen=True)
class _Case:
    """What is verified, and with what; see `verify`."""

    folder: Path
    submission: Submission
    run: Path
    record: Record
    root: Path
    data_root: Path | None
    store: ArtifactStore
    say: Say


def verify(
    folder: Path,
    run: Path,
    root: Path,
    level: Level,
    data_root: Path | None,
    store: ArtifactStore,
    *,
    seed: int | None = None,
    out: Path | None = None,
    seconds: float | None = None,
    say: Say = lambda _: None,
) -> Entry:
    """Takes one run of a submission up to a level; levels below that are missing come first.

    Nothing of the submission is ever imported in this process. What is found is written into the
    entry of the run on the leaderboard, level by level.

    Args:
        folder: of the submission.
        run: the folder that `mibench submission score` has written.
        root: of a version of the leaderboard.
        level: to reach.
        data_root: datasets in the hub's layout; needed above `Level.CLAIMED` for real images.
        store: our own cache.
        seed: of the rerun; one that nobody could know before, if None.
        out: folder of the rerun; that of the run with ``-again-sSEED`` if None.
        seconds: time for the rerun, if other than `sandbox.LIMITS` has it.
        say: told what happens.

    Returns:
        The entry as it is now.

    Raises:
        SubmissionError: something does not hold; it names all that was found.
        MibenchError: something needed is not here.
    """
    submission = load(folder)
    record = read_record(run)
    _refuse(f"{run}", _belongs(folder, submission, record))
    case = _Case(folder, submission, run, record, root, data_root, store, say)
    wanted = list(Level)[: list(Level).index(level) + 1]
    entry = _known(root, record)
    for one in wanted:
        if entry is not None and _reached(entry, one):
            say(f"{one}: reached already, nothing to do")
            continue
        if one is not Level.CLAIMED:
            refuse_missing_images(submission.protocols[_protocol_at(submission, record)], data_root)
        if one is Level.CLAIMED:
            entry = _claimed(case)
        elif one is Level.RESCORED:
            entry = _rescored(case)
        else:
            entry = _reproduced(case, seed, out, seconds)
        say(f"{one}: reached")
    assert entry is not None, "the first level makes it"
    return entry


def _known(root: Path, record: Record) -> Entry | None:
    if not (layout.record_folder(root, record.id) / layout.ENTRY).is_file():
        return None
    return entries.read_entry(root, record.id)


def _reached(entry: Entry, level: Level) -> bool:
    if level is Level.CLAIMED:
        # Being on the board is not enough: the battery belongs to this level too.
        return any(one.check == "submission" for v in entry.verifications for one in v.checks)
    return list(Level).index(entry.level) >= list(Level).index(level)


def _refuse(what: str, lines: Sequence[str]) -> None:
    if lines:
        raise SubmissionError([f"{what}: {one}" for one in lines])


def _failures(lines: Sequence[CheckLine]) -> list[str]:
    return [f"{one.check}: {one.found}" for one in lines if one.verdict == Verdict.FAILED]


# --- whose run it is -----------------------------------------------------------------------------


def _protocol_at(submission: Submission, record: Record) -> int:
    from mibench.protocol import load_protocol

    ids = [load_protocol(name).id for name in submission.protocols]
    return ids.index(record.protocol.id)


def _belongs(folder: Path, submission: Submission, record: Record) -> list[str]:
    """Why a record is not one of this submission's."""
    from mibench.protocol import load_protocol

    if record.status != "success":
        return [f"the record says {record.status!r}: the run has no result"]
    found = []
    released = {load_protocol(name).id: load_protocol(name) for name in submission.protocols}
    if record.protocol.id not in released:
        found.append(f"it ran under {record.protocol.id}, which submission.yaml does not name")
    elif record.protocol.content != released[record.protocol.id].content_id:
        found.append(f"it ran under another content of {record.protocol.id} than is released")
    if record.seed not in submission.seeds:
        found.append(f"it ran with seed {record.seed}, which submission.yaml does not name")
    own: Component = getattr(record, submission.kind)
    if submission.file is None:
        if own.name != submission.component or own.location is not None:
            found.append(f"its {submission.kind} is {own.location or own.name}")
    else:
        wanted = place(folder, submission)
        if own.location != wanted or own.name != submission.name:
            found.append(
                f"its {submission.kind} is {own.name} from {own.location}, not "
                f"{submission.name} from {wanted}"
            )
    found += _other_params(submission.kind, own, submission.params)
    other = record.attack if submission.kind == "defense" else record.defense
    if other.location is not None:
        found.append(f"it met {other.location}, which does not come with mibench")
    if submission.kind == "attack" and other.name not in {one.name for one in submission.entrants}:
        found.append(f"it met the defense {other.name}, which submission.yaml does not name")
    return found


def _other_params(kind: str, own: Component, given: object) -> list[str]:
    assert isinstance(given, dict), "read by the schema"
    return [
        f"its {kind} has {key} = {own.params.get(key)!r}, and submission.yaml says {value!r}"
        for key, value in given.items()
        if canonical_json(own.params.get(key)) != canonical_json(value)
    ]


def _way(folder: Path, submission: Submission) -> Way:
    """How the component is loaded in a confined process."""
    if submission.file is None:
        return Way(submission.component, submission.params)
    whole = folder.resolve()
    return Way(f"{whole}/{submission.component}", submission.params, (whole,))


# --- the levels ----------------------------------------------------------------------------------


def _claimed(case: _Case) -> Entry:
    submission, record, say = case.submission, case.record, case.say
    say("claimed: the record against its files")
    lines = _failures(check_lines(check_run(case.run)))
    say("claimed: the component in confined processes")
    findings, said = battery(case.folder, submission, record, say)
    lines += _failures(check_lines(findings))
    _refuse("claimed", lines)
    origin = Origin(
        kind="submission",
        submission=submission.name,
        title=submission.title,
        authors=submission.authors,
        paper=submission.paper,
        code=submission.code,
        licence=submission.licence,
        supersedes=submission.supersedes,
    )
    claims = submission.claims.get(record.protocol.id, {})
    entry = entries.add(
        case.run, case.root, origin, claims, data_root=case.data_root, store=case.store
    )
    if entry.origin != origin:
        who = entry.origin.submission or "mibench itself"
        raise SubmissionError([f"record {record.id} is on the board already, as one of {who}"])
    form = CheckLine(
        check="submission",
        verdict="passed",
        found=f"its folder is in form; the hash of its content is {content_of(case.folder)}",
    )
    walls = CheckLine(check="isolation", verdict="passed", found=said)
    checks = [form, *check_lines(findings), walls]
    return entries.verified(case.root, record.id, verification(Level.CLAIMED, checks))


def battery(
    folder: Path, submission: Submission, record: Record, say: Say
) -> tuple[list[Finding], str]:
    """Puts the component through `mibench check`, and holds its code against the record's.

    Returns:
        The findings, and what it was kept from.
    """
    kind, way = submission.kind, _way(folder, submission)
    own: Component = getattr(record, kind)
    with Nursery(targets.preload([kind])) as nursery:
        try:
            process = nursery.start("coder", None, way.readable)
            told, _ = process.ask(
                "component.code", kind=kind, name=way.name, params=dict(way.params), seconds=120.0
            )
            process.close()
            findings = targets.run(
                nursery, targets.Target(kind, way.name), way.params, lambda what: say(f"  {what}")
            )
        except ComponentError as error:
            return [error.finding], isolation(nursery.confined)
        except MibenchError as error:
            raise SubmissionError([str(error)]) from error
        same = told.get("code") == own.code
        tried = "compared the hash of the code with the record's"
        words = f"the code is {told.get('code')}, the record's {own.code}"
        verdict = Verdict.PASSED if same else Verdict.FAILED
        advice = "" if same else "score again after every change of the code"
        return [Finding("code", verdict, tried, words, advice), *findings], isolation(
            nursery.confined
        )


def _rescored(case: _Case) -> Entry:
    run, record, say = case.run, case.record, case.say
    data_root, store = case.data_root, case.store
    say("rescored: the stored images against the originals")
    arithmetic = check_lines(check_run(run, data_root, store.root))
    lines = [scores_again(run, record, store, data_root)]
    say("rescored: the weights, and an attack of our own from outside")
    weights, trained = _trained(case, Level.RESCORED)
    lines.append(weights)
    if weights.verdict == "passed":
        lines += looked_at(trained, store)
    wrong = [one for one in arithmetic if one.verdict == "failed"]
    lines += wrong or [
        CheckLine(check="record", verdict="passed", found="every check of the run holds")
    ]
    away = [one for one in lines if one.check == "rescored-scores" and one.verdict == "skipped"]
    _refuse("rescored", _failures(lines) + [f"{one.check}: {one.found}" for one in away])
    return entries.verified(case.root, record.id, verification(Level.RESCORED, lines))


def _trained(case: _Case, level: Level) -> tuple[CheckLine, Trained]:
    """The trained defense that lies beside a run, and whether it is the record's."""
    record, run = case.record, case.run
    protocol = protocol_of(record)
    roles = load_roles(protocol.data, case.data_root, case.store.root)
    try:
        artifact, spec = open_artifact(run / WEIGHTS)
    except MibenchError as error:
        raise SubmissionError([f"{level}: {run / WEIGHTS}: {error}"]) from error
    digest = hash_tensors(artifact.tensors)
    said = record.defense_facts.get("trained_weights")
    same = digest == said and spec.get("train") == roles.train.identity
    line = CheckLine(
        check="weights",
        verdict="passed" if same else "failed",
        found=f"they are {digest}, trained on {spec.get('train')}; the record says {said}, and "
        f"the protocol's train role is {roles.train.identity}",
    )
    way = _way(case.folder, case.submission)
    if case.submission.kind == "attack":
        way = Way(record.defense.name, record.defense.params)
    return line, Trained(record, protocol, roles, way, artifact.tensors)


def _reproduced(case: _Case, seed: int | None, out: Path | None, seconds: float | None) -> Entry:
    run, record, say = case.run, case.record, case.say
    data_root, store = case.data_root, case.store
    fresh = seed
    while fresh is None or (seed is None and fresh == record.seed):
        fresh = secrets.randbelow(2**31)
    whole = run.resolve()
    target = out or whole.with_name(f"{whole.name}-again-s{fresh}")
    if (target / "record.json").exists():
        raise SubmissionError([f"{target} holds a record already; choose another --out"])
    ensure_writable(target)
    say("reproduced: a decoder of our own, trained on its messages from outside")
    weights, trained = _trained(case, Level.REPRODUCED)
    _refuse("reproduced", _failures([weights]))
    attacked = thoroughly_attacked(trained)
    _refuse("reproduced", _failures(attacked))
    say(f"reproduced: the whole run again with seed {fresh}, in the sandbox: {target}")
    words = ["reproduce", str(whole), "--seed", str(fresh), "--out", str(target.resolve())]
    done = run_confined(
        words,
        target,
        case.folder,
        data_root,
        "the rerun",
        seconds,
        say,
        readable=[whole],
        fine=(0, 1),
    )
    sandbox.drop_cache(target)
    # The rerun's own verdict was made beside foreign code; this one is made here.
    again = read_record(target)
    lines = _failures(check_lines(check_run(target, data_root, store.root)))
    if again.seed != fresh or again.status != "success":
        lines.append(f"its record is of seed {again.seed} and says {again.status!r}")
    for kind in ("defense", "attack"):
        if getattr(again, kind).code != getattr(record, kind).code:
            lines.append(f"the code of its {kind} is not the record's")
    changed, table = values_beside(record, run)
    lines += [str(one) for one in changed]
    _refuse("reproduced", lines)
    verdict = compare(record, table, again, pd.read_parquet(target / PER_IMAGE))
    lines = [
        f"{row.place} of {row.metric}: {row.before:.4g} in the record, {row.after:.4g} again, "
        f"more than the noise floor ({row.tolerance:.3g}) allows"
        for row in verdict.rows
        if not row.agrees
    ]
    if verdict.word == "different":
        lines = lines or [str(one) for one in verdict.differences[:20]]
        _refuse("reproduced", lines)
    walls = CheckLine(check="isolation", verdict="passed", found=sandbox.walls(done.confined))
    rerun = CheckLine(
        check="rerun",
        verdict="passed",
        found=f"record {again.id}, {len(verdict.rows)} means within the noise floor of seeds",
    )
    told = verification(
        Level.REPRODUCED,
        [weights, *attacked, rerun, walls],
        verdict=verdict.word,
        seed=fresh,
        differences=[str(one) for one in verdict.differences if one.place in CIRCUMSTANCES],
    )
    return entries.verified(case.root, record.id, told)
