"""From a deployed defense to reconstructions: the worst coalition, the attack, its controls."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from mibench import progress, seeding
from mibench.artifacts import ArtifactStore, Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.ridge import Reader, ridge_error, shrink
from mibench.controls import permute
from mibench.data.roles import Roles
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Shares
from mibench.deployment import Deployed, hash_tensors
from mibench.errors import DataError, InvalidParamsError, PluginError, blaming
from mibench.files import Json
from mibench.job import Job
from mibench.params import build
from mibench.protocol import AdversaryRule
from mibench.record import AdversaryFacts
from mibench.registry import attacks, fingerprint
from mibench.threat import Adversary, Target, broken_messages, mended
from mibench.utility import values_sent

SCREENING_IMAGES = 4096
"""Auxiliary images on which coalitions are screened, at most."""
SCREENING_VALUES = 2**28
"""Values of all shares that the screening holds of each set, at most."""
LEAST_IMAGES = {"auxiliary": 4, "validation": 2}
"""Fewest images of the attacker's roles: with fewer there is nothing to learn or choose from."""


@dataclass(frozen=True)
class Assault:
    """A prepared attack on a deployed defense, with the shares that its servers received.

    What it rebuilds is kept in the cache batch by batch, so that no finished image is done again.

    Attributes:
        attacker: the prepared attack.
        adversary: who attacks, how the servers were chosen, and what they could not read.
        shares: the corrupted servers' shares of the attacked images.
        spec: everything that a reconstruction depends on.
        image_shape: (3, H, W).
        batch: images per batch.
        seconds: that `from_true_shares` and `from_permuted_shares` took when they were made.
    """

    attacker: Attack
    adversary: AdversaryFacts
    shares: Shares
    spec: Mapping[str, Json]
    image_shape: tuple[int, int, int]
    batch: int
    seconds: dict[str, float] = field(default_factory=dict)

    def from_true_shares(self) -> Tensor:
        """Rebuilds the attacked images (N, 3, H, W) in [0, 1]."""
        return self._rebuild("true", self.shares)

    def from_permuted_shares(self) -> Tensor:
        """The control: rebuilds each image from another image's shares."""
        return self._rebuild("permuted", permute(self.shares))

    def blind(self) -> dict[str, Tensor]:
        """The control: ``prior-sample``, images from the attack's prior alone, if it has one."""
        shop, count = self.attacker.workshop, len(self.shares[0])

        def make(_: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            with seeding.stream(shop.seed, "blind"), blaming(type(self.attacker), "blind"):
                images = self.attacker.blind(count)
                return {} if images is None else {"prior-sample": self._checked(images, count)}, {}

        return shop.keep("reconstruction", {**self.spec, "shares": "none"}, make).tensors

    def _rebuild(self, which: str, shares: Shares) -> Tensor:
        shop, method = self.attacker.workshop, type(self.attacker)
        parts = []
        for start in range(0, len(shares[0]), self.batch):
            part = slice(start, start + self.batch)
            # A copy: an attack that writes into its input must not reach the controls.
            chunk = tuple(share[part].clone().to(shop.device) for share in shares)

            def make(
                _: Checkpoint, chunk: Shares = chunk, start: int = start
            ) -> tuple[dict[str, Tensor], dict[str, Json]]:
                draws = seeding.stream(shop.seed, "reconstruct", which, start)
                began = time.perf_counter()
                with draws, blaming(method, "reconstruct"):
                    images = self._checked(self.attacker.reconstruct(chunk), len(chunk[0]))
                return {"images": images}, {"seconds": time.perf_counter() - began}

            spec = {**self.spec, "shares": which, "start": start}
            parts.append(shop.keep("reconstruction", spec, make))
        seconds = [float(part.facts["seconds"]) for part in parts]  # type: ignore[arg-type]
        self.seconds[which] = sum(seconds)
        return torch.cat([part.tensors["images"] for part in parts])

    def _checked(self, images: Tensor, count: int) -> Tensor:
        who, wanted = f"attack {self.attacker.name}", (count, *self.image_shape)
        if not isinstance(images, Tensor):
            raise PluginError(f"{who} returned {type(images).__name__}, not a tensor of images")
        if tuple(images.shape) != wanted:
            raise PluginError(f"{who} returned images of shape {tuple(images.shape)}, not {wanted}")
        whole = images.flatten(1).isfinite().all(1)
        if type(self.attacker).__module__.startswith("mibench.") and not whole.all():
            # A message of absurd size is the defense's doing; a plugin's own slip is told below.
            lost = int((~whole).sum())
            progress.note(f"{who} found no image for {lost} of {count} messages; grey stands there")
            images = images.where(whole.view(-1, 1, 1, 1), 0.5)
        if not images.isfinite().all() or images.min() < 0 or images.max() > 1:
            raise PluginError(f"{who} returned images with values that are not in [0, 1]")
        return images.detach().cpu().float()


def attack(
    job: Job, deployed: Deployed, roles: Roles, store: ArtifactStore, device: str
) -> Assault:
    """Prepares the attack against the worst coalition and sends the private images past it.

    Raises:
        DataError: the attacker has too few images.
    """
    protocol = job.protocol
    _check_images(job, roles)
    adversary, screening = chosen_adversary(job, deployed, roles, store, device)
    target = Target(deployed.defense, adversary, deployed.identity)
    method = attacks.load(job.attack)
    params = build(method.Params, job.merged_attack_params(), f"attack {job.attack}")
    workshop = Workshop(
        roles.train.image_shape, job.seed, torch.device(device), store, protocol.threads
    )
    with seeding.stream(job.seed, "prepare"), blaming(method, "prepare"):
        attacker = method(params, workshop)
        attacker.prepare(target, roles.auxiliary, roles.validation)

    facts, received = overheard(job, deployed, roles, adversary, screening)
    return Assault(
        attacker=attacker,
        adversary=facts,
        shares=received,
        spec={
            **attacker.spec_of(target, roles.auxiliary, roles.validation),
            "received": hash_tensors({str(at): share for at, share in enumerate(received)}),
            "batch": protocol.batch,
        },
        image_shape=roles.attacked.image_shape,
        batch=protocol.batch,
    )


def overheard(
    job: Job,
    deployed: Deployed,
    roles: Roles,
    adversary: Adversary,
    screening: Mapping[str, float],
) -> tuple[AdversaryFacts, Shares]:
    """Sends the private images past the adversary.

    The same job and the same trained defense give the same shares, whoever attacks.

    Args:
        job: its protocol and its seed count, not its attack.
        deployed: the trained defense.
        roles: the images.
        adversary: who listens.
        screening: how it was chosen; see `chosen_adversary`.

    Returns:
        The adversary for the record, and the corrupted servers' shares of the attacked images as an
        attack gets them.
    """
    protocol, private = job.protocol, roles.attacked
    # A stream of the users' own, which no attack draws from.
    users = seeding.derive(job.seed, "users", deployed.weights)
    with blaming(type(deployed.defense), "protect"):
        raw = adversary.observes(lambda turn: _send(deployed, private, protocol.batch, users, turn))
    facts = AdversaryFacts(
        knowledge=adversary.knowledge,
        corrupted=list(adversary.corrupted),
        transmissions=adversary.transmissions,
        auxiliary=protocol.adversary.auxiliary,
        screening=dict(screening),
        broken=broken_messages(raw),
        coalitions=[] if job.coalition is None else [list(job.coalition)],
    )
    return facts, mended(raw)


def coalitions_of(rule: AdversaryRule, defense: Defense) -> list[tuple[int, ...]]:
    """All coalitions of the protocol's size among the servers of a defense."""
    together = min(rule.coalition, defense.servers)
    return list(itertools.combinations(range(defense.servers), together))


def chosen_adversary(
    job: Job, deployed: Deployed, roles: Roles, store: ArtifactStore, device: str
) -> tuple[Adversary, dict[str, float]]:
    """Screens all coalitions of the protocol's size by ridge regression and picks the worst.

    Every attack meets the same adversary, so the errors are kept. A coalition that the job names
    is taken instead, whatever its error.
    """
    rule = job.protocol.adversary
    coalitions = coalitions_of(rule, deployed.defense)
    if job.coalition is not None and job.coalition not in coalitions:
        raise InvalidParamsError(
            f"there is no coalition {'+'.join(map(str, job.coalition))} of defense {job.defense}; "
            f"protocol {job.protocol.id} allows "
            f"{', '.join('+'.join(map(str, servers)) for servers in coalitions)}"
        )
    if len(coalitions) == 1:
        return Adversary(rule.knowledge, coalitions[0], rule.transmissions), {}
    names = {"+".join(map(str, coalition)): coalition for coalition in coalitions}
    spec: dict[str, Json] = {
        "defense": deployed.identity,
        "coalitions": list(names),
        "transmissions": rule.transmissions,
        "auxiliary": roles.auxiliary.identity,
        "validation": roles.validation.identity,
        "batch": job.protocol.batch,
        "seed": job.seed,
        "device": device,
        "threads": job.protocol.threads,
        "torch": torch.__version__,
        "code": [fingerprint(Assault), fingerprint(Reader), fingerprint(Target)],
    }

    def make(_: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
        found = _screened(job, deployed, roles, coalitions)
        return {}, {"errors": dict(zip(names, found, strict=True))}

    kept = cast("Mapping[str, float]", store.fetch("screening", spec, make).facts["errors"])
    errors = {name: kept[name] for name in names}
    chosen = job.coalition or names[min(errors, key=errors.__getitem__)]
    return Adversary(rule.knowledge, chosen, rule.transmissions), errors


def _screened(
    job: Job, deployed: Deployed, roles: Roles, coalitions: Sequence[tuple[int, ...]]
) -> list[float]:
    """The ridge regression's mean squared error on validation images, for each coalition."""
    rule, defense = job.protocol.adversary, deployed.defense
    size = min(SCREENING_IMAGES, max(1, SCREENING_VALUES // values_sent(defense, roles.validation)))
    learn, judge = roles.auxiliary.take(size), roles.validation.take(size)
    seen, other_seen = (torch.cat([shrink(c) for c in one.chunks()]) for one in (learn, judge))
    sent = _averaged(job, deployed, learn, seeding.derive(job.seed, "screening"))
    other = _averaged(job, deployed, judge, seeding.derive(job.seed, "screened"))
    errors = []
    with progress.task("Screening coalitions", total=len(coalitions)) as task:
        for coalition in coalitions:
            reader = Adversary(rule.knowledge, coalition)
            errors.append(
                ridge_error(reader.reads(sent), seen, reader.reads(other), other_seen, job.seed)
            )
            task.advance()
    return errors


def _check_images(job: Job, roles: Roles) -> None:
    """Refuses an attacker with too few images, before anything is trained on them."""
    for role, least in LEAST_IMAGES.items():
        count = len(getattr(roles, role))
        if count < least:
            raise DataError(
                f"the role {role!r} has {count} images, and attack {job.attack} needs at least "
                f"{least} there; raise data.{role} in protocol {job.protocol.id}, or give a larger "
                "dataset"
            )


def _send(deployed: Deployed, images: ImageSet, batch: int, seed: int, turn: int) -> Shares:
    """One transmission of images; each has a stream of its own, the first one that of ``seed``."""
    draws = seeding.derive(seed, turn) if turn else seed
    sent = deployed.defense.transmit(images, batch, draws)
    for server, share in enumerate(sent):
        broken = int((~share.flatten(1).isfinite()).any(1).sum())
        if broken:
            progress.note(
                f"defense {deployed.defense.name}: the share of server {server} holds values that "
                f"are infinite or not a number for {broken} of {len(images)} images; each is read "
                "as the mean of the others in its place"
            )
    return sent


def _averaged(job: Job, deployed: Deployed, images: ImageSet, seed: int) -> Shares:
    """The mean of all transmissions that the adversary sees: all that a linear reader can use."""
    times, batch = job.protocol.adversary.transmissions, job.protocol.batch
    total = mended(_send(deployed, images, batch, seed, 0))
    for turn in range(1, times):
        sent = mended(_send(deployed, images, batch, seed, turn))
        total = tuple(a + b for a, b in zip(total, sent, strict=True))
    return tuple(share / times for share in total)
