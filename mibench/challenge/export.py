"""Writes a challenge: the frozen shares of the private images, and none of the images.

What must never lie in the folder: pixels, labels or hashes of private images, and the undefended
shares of the same images, from which they can be solved for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import torch as safetensors_torch

from mibench import __version__
from mibench.artifacts import ArtifactStore
from mibench.assault import chosen_adversary, overheard
from mibench.board import layout
from mibench.challenge.grants import granted
from mibench.challenge.readme import readme
from mibench.challenge.schema import CHALLENGE, README, SHARES, WEIGHTS, Challenge, Message
from mibench.data.roles import load_roles
from mibench.deployment import fit
from mibench.errors import InvalidParamsError, MibenchError, RecordError, StorageError
from mibench.evaluate import component_of, identified
from mibench.files import canonical_json, ensure_writable, write_atomically
from mibench.job import UNDEFENDED, Job
from mibench.record import Component, Record, read_record
from mibench.registry import defenses
from mibench.rescore import refuse_other_data

STRENGTH = "leakage(ssim)"
"""Score by which, of several single attacks, the one that leaks most is taken."""


@dataclass(frozen=True)
class Belongs:
    """The record that a challenge belongs to.

    Attributes:
        id: of the record.
        record: what it says.
        folder: where it lies, with its values per image.
    """

    id: str
    record: Record
    folder: Path


def export(
    job: Job,
    belongs: Belongs,
    store: ArtifactStore,
    data_root: Path | None,
    device: str,
    out: Path,
) -> Challenge:
    """Writes the folder of a challenge.

    Args:
        job: names defense, protocol and seed; its attack does not matter.
        belongs: the record of this job; see `record_of`.
        store: cache; the trained defense is taken from there, or trained and put there.
        data_root: folder of datasets in the hub's layout, or None for the hub.
        device: a PyTorch device.
        out: the folder.

    Raises:
        InvalidParamsError: nothing protects the images, or a folder cannot grant what the adversary
            has.
        RecordError: the trained defense, the images or the servers are not those of the record.
        StorageError: the folder holds something already, or cannot be written.
        MibenchError: see `load_roles` and `fit`.
    """
    defense = _protecting(job)
    if out.exists() and any(out.iterdir()):
        raise StorageError(f"{out} is not empty; choose another --out")
    record, protocol = belongs.record, job.protocol
    torch.set_num_threads(protocol.threads)
    roles = load_roles(protocol.data, data_root, store.root)
    refuse_other_data(record, protocol, roles)
    deployed = fit(job, roles, store, device)
    if record.defense_facts.get("trained_weights") != deployed.weights:
        raise RecordError(
            f"the trained defense here has other weights ({deployed.weights}) than that of record "
            f"{belongs.id} ({record.defense_facts.get('trained_weights')}); export where the run "
            "was made, or give its weights with --weights"
        )
    adversary, screening = chosen_adversary(job, deployed, roles, store, device)
    facts, shares = overheard(job, deployed, roles, adversary, screening)
    if record.adversary is None or facts.corrupted != record.adversary.corrupted:
        raise RecordError(f"record {belongs.id} is of other servers than {facts.corrupted}")
    grants = granted(deployed.defense, adversary, roles.auxiliary)
    size = len(adversary.corrupted)
    messages = [
        Message(
            name=f"transmission-{at // size}/server-{adversary.corrupted[at % size]}",
            server=adversary.corrupted[at % size],
            transmission=at // size,
            shape=list(share.shape[1:]),
            dtype=str(share.dtype).removeprefix("torch."),
        )
        for at, share in enumerate(shares)
    ]
    named = {one.name: share.contiguous() for one, share in zip(messages, shares, strict=True)}
    challenge = Challenge(
        protocol=identified(protocol, ranked=protocol.ranked),
        defense=defense,
        seed=job.seed,
        adversary=facts,
        image_size=protocol.data.image_size,
        images=len(shares[0]),
        messages=messages,
        granted=sorted(grants.tensors),
        withheld=sorted(grants.withheld),
        partly=grants.partly,
        attackers_images={
            "auxiliary": roles.auxiliary.identity,
            "validation": roles.validation.identity,
        },
        record=belongs.id,
        mibench=__version__,
        torch=torch.__version__,
        files={},
    )
    files: dict[str, bytes] = {
        SHARES: safetensors_torch.save(named),
        WEIGHTS: safetensors_torch.save(grants.tensors),
        README: readme(challenge, protocol, record),
    }
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    challenge = challenge.model_copy(update={"files": hashes})
    ensure_writable(out)
    for name, data in files.items():
        write_atomically(out / name, data)
    # Last: who finds it finds all other files whole.
    write_atomically(out / CHALLENGE, challenge.to_yaml())
    return challenge


def record_of(job: Job, root: Path, given: Path | None) -> Belongs:
    """Finds the record that a challenge of this job belongs to.

    Of several, it is that of the suite, else of the single attack that leaks most.

    Args:
        job: what is to be exported.
        root: folder of the leaderboard's version, such as ``leaderboard/v1``.
        given: the folder of a run, or of a record on the board, to use instead.

    Raises:
        RecordError: there is none, or the given one is of another job.
        InvalidParamsError: nothing protects the images, or a parameter is wrong.
    """
    wanted = _protecting(job)
    if given is not None:
        record = read_record(given)
        if other := _difference(job, wanted, record):
            raise RecordError(f"{given} is not the record of this challenge: {other}")
        return Belongs(record.id, record, given if given.is_dir() else given.parent)
    found = [one for one in _on(root) if _difference(job, wanted, one.record) is None]
    replaced = {one.record.supersedes for one in found}
    found = [one for one in found if one.id not in replaced]
    if not found:
        raise RecordError(
            f"no record in {root} is of defense {job.defense} with these parameters under "
            f"{job.protocol.id} with seed {job.seed}; add one first, or name a run with --record"
        )
    return max(found, key=lambda one: (bool(one.record.suite), _strength(one.record), one.id))


def find_record(record: str, root: Path, given: Path | None) -> Belongs:
    """Finds a record by its id: on the board, or in the folder of a run.

    Raises:
        RecordError: it is not there.
    """
    folder = layout.record_folder(root, record) if given is None else given
    found = read_record(folder)
    if found.id != record:
        raise RecordError(f"{folder} holds the record {found.id}, and not {record}")
    return Belongs(record, found, folder if folder.is_dir() else folder.parent)


def _on(root: Path) -> Iterable[Belongs]:
    for path in sorted(layout.records(root).glob("*/record.json")):
        try:
            record = read_record(path)
        except MibenchError:  # the board's own check tells what is wrong with it
            continue
        yield Belongs(record.id, record, path.parent)


def _difference(job: Job, wanted: Component, record: Record) -> str | None:
    """Names the first thing in which a record is of another job, or of none that counts."""
    if record.status != "success":
        return f"its run says {record.status!r}"
    if record.adversary is None or record.adversary.coalitions:
        return "not the coalition of the screening alone attacked in it"
    pairs: Mapping[str, tuple[object, object]] = {
        "the protocol's content": (job.protocol.content_id, record.protocol.content),
        "the defense": (wanted.name, record.defense.name),
        "its code": (wanted.code, record.defense.code),
        "the seed": (job.seed, record.seed),
    }
    for name, (here, there) in pairs.items():
        if here != there:
            return f"{name} is {there} there and {here} here"
    if canonical_json(wanted.params) != canonical_json(record.defense.params):
        return "the defense has other parameters there"
    return None


def _protecting(job: Job) -> Component:
    """The job's defense, with all its parameters."""
    if job.defense == UNDEFENDED:
        raise InvalidParamsError(
            f"{UNDEFENDED} protects nothing: its shares would give away the images of all other "
            "challenges of the protocol; name a defense"
        )
    return component_of(defenses.load(job.defense), job.defense, job.defense_params)


def _strength(record: Record) -> float:
    found = {one.metric: one.value for one in record.leakage}.get(STRENGTH)
    return float("-inf") if found is None else found
