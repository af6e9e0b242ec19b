"""What a submission's trained defense does, seen from outside its processes.

The defense runs in confined processes, client and servers apart, and gives tensors back. Everything
that is concluded from them is computed here: accuracy, bytes, and an attack of our own, which the
defense cannot tell from a user.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
QUICK, THOROUGH = "linear", "decoder"
"""Attacks that we make ourselves: they ask for messages alone, and take seconds and minutes."""
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


@dataclass(frozen=True)
class Trained:
    """A submission's trained defense, and what is said of it.

    Attributes:
        record: of the run.
        protocol: of the record.
        roles: its images.
        way: how the defense is loaded.
        weights: trained ones, checked against the record already.
    """

    record: Record
    protocol: Protocol
    roles: Roles
    way: Way
    weights: Mapping[str, Tensor]


class Remote:
    """A trained defense in processes of its own, with the methods that an attacker can reach.

    Args:
        nursery: starts the processes.
        trained: what runs in them.
    """

    def __init__(self, nursery: Nursery, trained: Trained) -> None:
        self.task = trained.roles.task
        self._nursery, self._trained = nursery, trained
        self._turn = 0
        self._secret = secrets.randbelow(2**31)
        self._client = self._start("client")
        self.servers = int(self._facts["servers"])
        self._servers = [self._start(f"server-{k}") for k in range(self.servers)]
        # It has sent nothing, so it can remember no image when replies come back.
        self._reader = self._start("reader")

    def _start(self, role: str) -> Process:
        trained = self._trained
        way, rule = trained.way, trained.protocol.backbone
        process = self._nursery.start(role, LIMITS, way.readable)
        process.ask("component.load", kind="defense", name=way.name, params=dict(way.params))
        self._facts, _ = process.ask(
            "defense.build",
            backbone=rule.name,
            backbone_params=dict(rule.params),
            split_point=rule.split_point,
            image_shape=list(trained.roles.train.image_shape),
            classes=list(self.task.names),
            attributes=isinstance(self.task, Attributes),
            seed=trained.record.seed,  # of the initial weights, which the trained ones replace
        )
        if self._facts["misfit"] is not None:
            raise SubmissionError([f"it cannot be built: {self._facts['misfit']}"])
        process.ask("defense.load", trained.weights)
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


def looked_at(trained: Trained, store: ArtifactStore) -> list[CheckLine]:
    """Measures again what a record says of a defense, from its weights and from outside.

    Args:
        trained: the defense.
        store: our own cache; the undefended model is taken from there, or trained.

    Returns:
        One line for each thing that was measured; a verdict ``failed`` where the record says
        otherwise.
    """
    lines = _questioned(trained, _accuracy, _cost, partial(_attack, attack=QUICK))
    return [*lines, *_undefended(trained, store)]


def thoroughly_attacked(trained: Trained) -> list[CheckLine]:
    """Trains a decoder of our own on a defense's messages, and holds it against the record.

    Returns:
        As `looked_at`.
    """
    return _questioned(trained, partial(_attack, attack=THOROUGH))


def _questioned(
    trained: Trained, *questions: Callable[[Trained, Remote], CheckLine]
) -> list[CheckLine]:
    """Puts a defense into its processes, asks all questions, and says what it was kept from."""
    torch.set_num_threads(trained.protocol.threads)
    lines: list[CheckLine] = []
    with Nursery(["mibench.checks.defense_host"]) as nursery:
        try:
            remote = Remote(nursery, trained)
            lines += [question(trained, remote) for question in questions]
        except ComponentError as error:
            lines.append(_line("outside", False, f"{error.finding.check}: {error.finding.found}"))
        except SubmissionError as error:
            lines.append(_line("outside", False, str(error)))
        walls = isolation(nursery.confined)
    return [*lines, CheckLine(check="isolation", verdict="passed", found=walls)]


def _line(check: str, good: bool, found: str) -> CheckLine:
    return CheckLine(check=check, verdict="passed" if good else "failed", found=found)


def _value(scores: Sequence[Score], name: str) -> float | None:
    return next((one.value for one in scores if one.metric == name), None)


def _accuracy(trained: Trained, remote: Remote) -> CheckLine:
    roles, batch = trained.roles, trained.protocol.batch
    right: list[Tensor] = []
    flips: list[Tensor] = []
    at = 0
    for images in roles.private.chunks(batch):
        labels = roles.private.labels[at : at + len(images)]
        shares, others = remote.protect(images), remote.protect(images)
        right.append(roles.task.correct(remote.logits(shares), labels))
        if any(not torch.equal(a, b) for a, b in zip(shares, others, strict=True)):
            flips.append(right[-1] != roles.task.correct(remote.logits(others), labels))
        at += len(images)
    found, count = float(torch.cat(right).double().mean()), at
    said = _value(trained.record.utility, "accuracy")
    # An image that is right with probability p adds 2 p (1 - p) to the variance of the difference
    # of two such counts: as often do two draws of it differ.
    differ = float(torch.cat(flips).double().mean()) if flips else 0.0
    allowed = max(PLAIN, (3 if flips else 1) / count, SIGMAS * (differ / count) ** 0.5)
    words = (
        f"{found:.4f} on {count} images, from the weights, client and servers in processes "
        f"of their own; the record says {said if said is None else format(said, '.4f')}"
    )
    return _line("accuracy", said is not None and abs(found - said) <= allowed + 1e-9, words)


def _cost(trained: Trained, remote: Remote) -> CheckLine:
    image = trained.roles.attacked.images(slice(0, 1))
    sent, flops = bytes_on_wire(remote.protect(image)), remote.client_flops(image)
    said = trained.record.cost
    same = said is not None and (sent, flops) == (said.bytes_up, said.client_flops)
    told = "nothing" if said is None else f"{said.bytes_up} bytes and {said.client_flops} FLOPs"
    return _line(
        "cost", same, f"{sent} bytes up and {flops} FLOPs on the client; the record says {told}"
    )


def _attack(trained: Trained, remote: Remote, attack: str) -> CheckLine:
    """Reads the messages ourselves: a run that hid what it leaks shows less than we get."""
    record = trained.record
    servers = () if record.adversary is None else tuple(record.adversary.corrupted)
    ours = _own_psnr(trained, cast("Defense", remote), servers, attack)
    whole, theirs = _value(record.scores, "psnr"), _of_the_attack(record, attack)
    words = f"our own {attack} attack on its messages reaches {ours:.2f} dB"
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


def _of_the_attack(record: Record, attack: str) -> float | None:
    """The PSNR of an attack in a record: its own, or a part of its suite's."""
    if record.attack.name == attack:
        return _value(record.scores, "psnr")
    part = next((one for one in record.suite if one.attack == attack), None)
    return None if part is None else _value(part.scores, "psnr")


def _own_psnr(trained: Trained, defense: Defense, servers: tuple[int, ...], attack: str) -> float:
    """Mean PSNR of an attack that is trained and made in this process."""
    protocol, roles, seed = trained.protocol, trained.roles, trained.record.seed
    rule = protocol.adversary
    adversary = Adversary(rule.knowledge, servers or (0,), rule.transmissions)
    method = attacks.load(attack)
    params = build(method.Params, protocol.attacks.get(attack, {}), f"attack {attack}")
    # What is learned from foreign messages goes nowhere else.
    with tempfile.TemporaryDirectory() as kept, seeding.stream(seed, "outside"):
        store = ArtifactStore(Path(kept))
        shop = Workshop(roles.train.image_shape, seed, torch.device("cpu"), store, protocol.threads)
        attacker = method(params, shop)
        target = Target(defense, adversary, f"outside-{secrets.token_hex(8)}")
        attacker.prepare(target, roles.auxiliary, roles.validation)
        parts = []
        for images in roles.attacked.chunks(protocol.batch):
            with torch.no_grad():
                sent = mended(adversary.observes(lambda _, x=images: defense.protect(x)))  # type: ignore[misc]
            parts.append(attacker.reconstruct(sent))
    originals = roles.attacked.images()
    values = metrics.load("psnr")()(rounded(torch.cat(parts).float()), originals)
    return float(values.mean())


def _undefended(trained: Trained, store: ArtifactStore) -> Iterator[CheckLine]:
    """The reference of accuracy and leakage, trained where no foreign code was."""
    record, protocol, roles = trained.record, trained.protocol, trained.roles
    job = Job(protocol, UNDEFENDED, QUICK, {}, {}, record.seed)
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
    if _of_the_attack(record, QUICK) is None:
        return
    ours = _own_psnr(trained, reference.defense, (0,), QUICK)
    theirs = _value(record.undefended, "psnr")
    # The worst of several attacks reaches at least what one of them does.
    good = theirs is not None and ours <= theirs + TOLERANCE["psnr"]
    yield _line(
        "undefended-attack",
        good,
        f"{QUICK} reaches {ours:.2f} dB on a model trained here; the record's undefended split "
        f"{theirs if theirs is None else format(theirs, '.2f')} dB",
    )
