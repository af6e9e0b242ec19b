"""What a submission's trained defense does, seen from outside its processes.

The defense runs in confined processes, client and servers apart, and gives tensors back. Everything
that is concluded from them is computed here: accuracy, bytes, and an attack of our own, which the
defense cannot tell from a user.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from mibench import seeding
from mibench.artifacts import ArtifactStore
from mibench.attacks.base import Workshop
from mibench.board.model import CheckLine
from mibench.checks.confine import Limits
from mibench.checks.process import ComponentError, Nursery, Process, isolation
from mibench.checks.shares import unnamed
from mibench.data.roles import Roles
from mibench.defenses.base import Shares
from mibench.deployment import fit
from mibench.errors import SubmissionError
from mibench.job import UNDEFENDED, Job
from mibench.metrics.cost import bytes_on_wire
from mibench.params import build
from mibench.protocol import Protocol
from mibench.record import Record, Score
from mibench.registry import attacks, metrics
from mibench.stored import rounded
from mibench.task import Attributes
from mibench.threat import Adversary, Target, mended
from mibench.utility import answers
from mibench.verdict import TOLERANCE

if TYPE_CHECKING:
    from mibench.defenses.base import Defense

LIMITS = Limits(seconds=300.0, cpu_seconds=6 * 3600, memory_bytes=6 * 2**30)
ATTACK = "linear"
"""The attack that we make ourselves: it asks for messages alone, and takes seconds."""
PLAIN, SIGMAS = 0.002, 3.5
"""How far an accuracy may be off: without randomness, and in standard errors of fresh draws."""


@dataclass(frozen=True)
class Way:
    """How the component is loaded in its processes.

    Attributes:
        name: of a built-in, or ``/path/file.py:Class``.
        params: its parameters.
        readable: folders that it may read.
    """

    name: str
    params: Mapping[str, Any]
    readable: tuple[Path, ...] = ()


class Remote:
    """A trained defense in processes of its own, with the methods that an attacker can reach.

    Args:
        nursery: starts the processes.
        way: how it is loaded.
        protocol: gives the backbone.
        roles: give shape and task.
        weights: the trained ones.
        seed: of the initial weights, which the trained ones replace.
    """

    def __init__(
        self,
        nursery: Nursery,
        way: Way,
        protocol: Protocol,
        roles: Roles,
        weights: Mapping[str, Tensor],
        seed: int,
    ) -> None:
        self.task = roles.task
        self._nursery, self._way, self._protocol = nursery, way, protocol
        self._shape, self._weights, self._seed = roles.train.image_shape, weights, seed
        self._turn = 0
        self._secret = secrets.randbelow(2**31)
        self._client = self._start("client")
        self.servers = int(self._facts["servers"])
        self._servers = [self._start(f"server-{k}") for k in range(self.servers)]
        # It has sent nothing, so it can remember no image when replies come back.
        self._reader = self._start("reader")

    def _start(self, role: str) -> Process:
        way, rule = self._way, self._protocol.backbone
        process = self._nursery.start(role, LIMITS, way.readable)
        process.ask("component.load", kind="defense", name=way.name, params=dict(way.params))
        self._facts, _ = process.ask(
            "defense.build",
            backbone=rule.name,
            backbone_params=dict(rule.params),
            split_point=rule.split_point,
            image_shape=list(self._shape),
            classes=list(self.task.names),
            attributes=isinstance(self.task, Attributes),
            seed=self._seed,
        )
        if self._facts["misfit"] is not None:
            raise SubmissionError([f"it cannot be built: {self._facts['misfit']}"])
        process.ask("defense.load", self._weights)
        return process

    def protect(self, images: Tensor) -> Shares:
        """Sends images through the client; draws that nobody has seen before."""
        self._turn += 1
        _, found = self._client.ask(
            "defense.protect", {"images": images}, ambient=[self._secret, "outside", self._turn]
        )
        shares = unnamed(found)
        fits = len(shares) == self.servers and all(len(one) == len(images) for one in shares)
        if not fits:
            raise SubmissionError(["its client sends no share for every server and image"])
        return shares

    def logits(self, shares: Shares) -> Tensor:
        """What servers and fusion, each in its own process, make of shares; (B, outputs)."""
        replies = {
            f"reply.{k}": server.ask("defense.serve", {"share": share}, index=k)[1]["reply"]
            for k, (server, share) in enumerate(zip(self._servers, shares, strict=True))
        }
        found = self._reader.ask("defense.fuse", replies)[1]["logits"]
        if found.shape != (len(shares[0]), self.task.outputs):
            raise SubmissionError(["its fusion gives no logits for every image"])
        return found.float()

    def client_flops(self, image: Tensor) -> int:
        """Counts what the client does for one image; the count is made beside the component."""
        told, _ = self._client.ask("defense.cost", {"images": image})
        return int(told["client_flops"])


def looked_at(
    record: Record,
    protocol: Protocol,
    roles: Roles,
    way: Way,
    weights: Mapping[str, Tensor],
    store: ArtifactStore,
) -> list[CheckLine]:
    """Measures again what a record says of a defense, from its weights and from outside.

    Args:
        record: of the run.
        protocol: of the record.
        roles: its images.
        way: how the defense is loaded.
        weights: trained ones, checked against the record already.
        store: our own cache; the undefended model is taken from there, or trained.

    Returns:
        One line for each thing that was measured; a verdict ``failed`` where the record says
        otherwise.
    """
    torch.set_num_threads(protocol.threads)
    lines: list[CheckLine] = []
    with Nursery(["mibench.checks.defense_host"]) as nursery:
        try:
            remote = Remote(nursery, way, protocol, roles, weights, record.seed)
            lines.append(_accuracy(record, remote, protocol, roles))
            lines.append(_cost(record, remote, roles))
            lines.append(_attack(record, remote, protocol, roles))
        except ComponentError as error:
            lines.append(_line("outside", False, f"{error.finding.check}: {error.finding.found}"))
        except SubmissionError as error:
            lines.append(_line("outside", False, str(error)))
        lines.append(
            CheckLine(check="isolation", verdict="passed", found=isolation(nursery.confined))
        )
    lines += _undefended(record, protocol, roles, store)
    return lines


def _line(check: str, good: bool, found: str) -> CheckLine:
    return CheckLine(check=check, verdict="passed" if good else "failed", found=found)


def _value(scores: Sequence[Score], name: str) -> float | None:
    return next((one.value for one in scores if one.metric == name), None)


def _accuracy(record: Record, remote: Remote, protocol: Protocol, roles: Roles) -> CheckLine:
    right: list[Tensor] = []
    flips: list[Tensor] = []
    at = 0
    for images in roles.private.chunks(protocol.batch):
        labels = roles.private.labels[at : at + len(images)]
        shares, others = remote.protect(images), remote.protect(images)
        right.append(roles.task.correct(remote.logits(shares), labels))
        if any(not torch.equal(a, b) for a, b in zip(shares, others, strict=True)):
            flips.append(right[-1] != roles.task.correct(remote.logits(others), labels))
        at += len(images)
    found, count = float(torch.cat(right).double().mean()), at
    said = _value(record.utility, "accuracy")
    # An image that is right with probability p adds 2 p (1 - p) to the variance of the difference
    # of two such counts: as often do two draws of it differ.
    differ = float(torch.cat(flips).double().mean()) if flips else 0.0
    allowed = max(PLAIN, (3 if flips else 1) / count, SIGMAS * (differ / count) ** 0.5)
    words = (
        f"{found:.4f} on {count} images, from the weights, client and servers in processes "
        f"of their own; the record says {said if said is None else format(said, '.4f')}"
    )
    return _line("accuracy", said is not None and abs(found - said) <= allowed + 1e-9, words)


def _cost(record: Record, remote: Remote, roles: Roles) -> CheckLine:
    image = roles.attacked.images(slice(0, 1))
    sent, flops = bytes_on_wire(remote.protect(image)), remote.client_flops(image)
    said = record.cost
    same = said is not None and (sent, flops) == (said.bytes_up, said.client_flops)
    told = "nothing" if said is None else f"{said.bytes_up} bytes and {said.client_flops} FLOPs"
    return _line(
        "cost", same, f"{sent} bytes up and {flops} FLOPs on the client; the record says {told}"
    )


def _attack(record: Record, remote: Remote, protocol: Protocol, roles: Roles) -> CheckLine:
    """Reads the messages ourselves: a run that hid what it leaks shows less than we get."""
    servers = () if record.adversary is None else tuple(record.adversary.corrupted)
    ours = _own_psnr(cast("Defense", remote), servers, protocol, roles, record.seed)
    whole = _value(record.scores, "psnr")
    part = next((one for one in record.suite if one.attack == ATTACK), None)
    theirs = _value(part.scores, "psnr") if part is not None else None
    if record.attack.name == ATTACK:
        theirs = whole
    words = f"our own {ATTACK} attack on its messages reaches {ours:.2f} dB"
    far = TOLERANCE["psnr"]
    if theirs is not None:
        good = abs(ours - theirs) <= far
        return _line("outside-attack", good, f"{words}, the record's {theirs:.2f} dB")
    if whole is None:
        return CheckLine(check="outside-attack", verdict="skipped", found="the record has no PSNR")
    return CheckLine(
        check="outside-attack",
        # Another attack than this may honestly be the weaker one.
        verdict="passed" if ours <= whole + far else "warned",
        found=f"{words}; the record's attack {record.attack.name} {whole:.2f} dB",
    )


def _own_psnr(
    defense: Defense, servers: tuple[int, ...], protocol: Protocol, roles: Roles, seed: int
) -> float:
    """Mean PSNR of the linear attack, trained and made in this process."""
    rule = protocol.adversary
    adversary = Adversary(rule.knowledge, servers or (0,), rule.transmissions)
    method = attacks.load(ATTACK)
    params = build(method.Params, protocol.attacks.get(ATTACK, {}), f"attack {ATTACK}")
    shape = roles.train.image_shape
    shop = Workshop(shape, seed, torch.device("cpu"), _Nowhere(), protocol.threads)
    with seeding.stream(seed, "outside"), torch.no_grad():
        attacker = method(params, shop)
        target = Target(defense, adversary, f"outside-{secrets.token_hex(8)}")
        attacker.prepare(target, roles.auxiliary, roles.validation)
        parts = []
        for images in roles.attacked.chunks(protocol.batch):
            sent = mended(adversary.observes(lambda _, x=images: defense.protect(x)))  # type: ignore[misc]
            parts.append(attacker.reconstruct(sent))
    originals = roles.attacked.images()
    values = metrics.load("psnr")()(rounded(torch.cat(parts).float()), originals)
    return float(values.mean())


class _Nowhere(ArtifactStore):
    """A cache that keeps nothing: what is learned from foreign messages goes nowhere else."""

    def __init__(self) -> None:
        super().__init__(Path("/nonexistent"))

    def fetch(self, kind: str, spec: Any, make: Any) -> Any:
        from mibench.artifacts import Artifact, Checkpoint

        tensors, facts = make(Checkpoint(Path("/nonexistent")))
        return Artifact(kind, self.key(kind, spec), dict(tensors), dict(facts), reused=False)


def _undefended(
    record: Record, protocol: Protocol, roles: Roles, store: ArtifactStore
) -> Iterator[CheckLine]:
    """The reference of accuracy and leakage, trained where no foreign code was."""
    job = Job(protocol, UNDEFENDED, ATTACK, {}, {}, record.seed)
    reference = fit(job, roles, store, "cpu")
    told = roles.task.correct(
        answers(reference.defense, roles.private, protocol.batch), roles.private.labels
    )
    found, said = float(told.double().mean()), _value(record.utility, "undefended accuracy")
    allowed = max(TOLERANCE["accuracy"], 1 / len(roles.private))
    yield _line(
        "undefended-accuracy",
        said is not None and abs(found - said) <= allowed,
        f"{found:.4f} of a model trained here; the record says "
        f"{said if said is None else format(said, '.4f')}",
    )
    part = next((one for one in record.suite if one.attack == ATTACK), None)
    if part is None and record.attack.name != ATTACK:
        return
    ours = _own_psnr(reference.defense, (0,), protocol, roles, record.seed)
    theirs = _value(record.undefended, "psnr")
    # The worst of several attacks reaches at least what one of them does.
    good = theirs is not None and ours <= theirs + TOLERANCE["psnr"]
    yield _line(
        "undefended-attack",
        good,
        f"{ATTACK} reaches {ours:.2f} dB on a model trained here; the record's undefended split "
        f"{theirs if theirs is None else format(theirs, '.2f')} dB",
    )
