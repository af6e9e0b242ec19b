"""The straight way through: protocol → data → defense → target → attack → scores → record."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from mibench import progress, seeding
from mibench.artifacts import ArtifactStore, Checkpoint
from mibench.attacks.base import Attack, Workshop
from mibench.attacks.ridge import ridge_error
from mibench.backbones.base import BackboneSpec, Split
from mibench.controls import blind_guesses, permute
from mibench.data.base import ImageSet, Roles, load_roles
from mibench.defenses.base import Defense, Facts, Shares
from mibench.errors import InvalidParamsError, PluginError, blaming
from mibench.files import Json, content_id
from mibench.metrics.cost import bytes_on_wire, client_cost, count_parameters
from mibench.params import build
from mibench.protocol import Protocol
from mibench.provenance import provenance
from mibench.record import AdversaryFacts, Component, Cost, ProtocolId, Record
from mibench.registry import attacks, backbones, defenses, fingerprint
from mibench.scoring import Scores, accuracy_score, leakage_scores, score
from mibench.threat import Adversary, Target
from mibench.training import Step

UNDEFENDED = "none"
"""Name of the reference that leakage and accuracy are normalised by."""
SCREENING_IMAGES = 4096
"""Auxiliary images on which coalitions are screened."""


@dataclass(frozen=True)
class Job:
    """What to run: one defense against one attack under one protocol with one seed.

    ``defense_params`` and ``attack_params`` are what the user set; the protocol's own attack
    parameters lie beneath.
    """

    protocol: Protocol
    defense: str
    attack: str
    defense_params: Mapping[str, Json]
    attack_params: Mapping[str, Json]
    seed: int = 0

    def undefended(self) -> Job:
        """The same attack on the undefended split."""
        return Job(self.protocol, UNDEFENDED, self.attack, {}, self.attack_params, self.seed)

    def merged_attack_params(self) -> dict[str, Json]:
        """The protocol's parameters of this attack with the user's on top."""
        return _merge(self.protocol.attacks.get(self.attack, {}), self.attack_params)

    def deviations(self) -> list[str]:
        """How this job departs from its protocol."""
        found = [f"attack.{key} set by hand" for key in sorted(self.attack_params)]
        if self.seed not in self.protocol.seeds:
            found.append(f"seed {self.seed} is none of the protocol's {list(self.protocol.seeds)}")
        return found


@dataclass(frozen=True)
class Deployed:
    """A trained defense, ready to be attacked.

    Attributes:
        defense: the model in evaluation mode.
        identity: content id of the trained weights.
        facts: what training reported.
    """

    defense: Defense
    identity: str
    facts: Facts


@dataclass(frozen=True)
class Assault:
    """A prepared attack on a deployed defense, with the shares that its servers received.

    What it rebuilds is kept in the cache batch by batch, so that no finished image is done again.

    Attributes:
        attacker: the prepared attack.
        adversary: who attacks, and how the servers were chosen.
        shares: the corrupted servers' shares of the attacked images.
        spec: everything that a reconstruction depends on.
        image_shape: (3, H, W).
        batch: images per batch.
    """

    attacker: Attack
    adversary: AdversaryFacts
    shares: Shares
    spec: Mapping[str, Json]
    image_shape: tuple[int, int, int]
    batch: int

    def from_true_shares(self) -> Tensor:
        """Rebuilds the attacked images (N, 3, H, W) in [0, 1]."""
        return self._rebuild("true", self.shares)

    def from_permuted_shares(self) -> Tensor:
        """The control: rebuilds each image from another image's shares."""
        return self._rebuild("permuted", permute(self.shares))

    def blind(self) -> Tensor | None:
        """The control: images from the attack's prior alone, None if it has no prior."""
        shop, count = self.attacker.workshop, len(self.shares[0])

        def make(_: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Json]]:
            with seeding.stream(shop.seed, "blind"):
                images = self.attacker.blind(count)
            return ({} if images is None else {"images": self._checked(images, count)}), {}

        kept = shop.keep("reconstruction", {**self.spec, "shares": "none"}, make)
        return kept.tensors.get("images")

    def _rebuild(self, which: str, shares: Shares) -> Tensor:
        shop, method = self.attacker.workshop, type(self.attacker)
        parts = []
        for start in range(0, len(shares[0]), self.batch):
            chunk = tuple(share[start : start + self.batch].to(shop.device) for share in shares)

            def make(
                _: Checkpoint, chunk: Shares = chunk, start: int = start
            ) -> tuple[dict[str, Tensor], dict[str, Json]]:
                draws = seeding.stream(shop.seed, "reconstruct", which, start)
                with draws, blaming(method, "reconstruct"):
                    images = self.attacker.reconstruct(chunk)
                return {"images": self._checked(images, len(chunk[0]))}, {}

            spec = {**self.spec, "shares": which, "start": start}
            parts.append(shop.keep("reconstruction", spec, make).tensors["images"])
        return torch.cat(parts)

    def _checked(self, images: Tensor, count: int) -> Tensor:
        who, wanted = f"attack {self.attacker.name}", (count, *self.image_shape)
        if tuple(images.shape) != wanted:
            raise PluginError(f"{who} returned images of shape {tuple(images.shape)}, not {wanted}")
        if not images.isfinite().all() or images.min() < 0 or images.max() > 1:
            raise PluginError(f"{who} returned images with values that are not in [0, 1]")
        return images.detach().cpu().float()


@dataclass(frozen=True)
class Result:
    """A record with the images and per-image values that it rests on."""

    record: Record
    originals: ImageSet
    reconstructions: Tensor
    controls: dict[str, Tensor]
    per_image: dict[str, Tensor]


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
    record = open_record(job, device)
    torch.set_num_threads(job.protocol.threads)
    roles = load_roles(job.protocol.data, data_root)
    private = roles.private.take(job.protocol.data.attacked)

    deployed = fit(job, roles, store, device)
    reference = (
        deployed if job.defense == UNDEFENDED else fit(job.undefended(), roles, store, device)
    )
    assault = attack(job, deployed, roles, store, device)
    baseline = assault if deployed is reference else attack(job, reference, roles, store, device)

    rebuilt, permuted = assault.from_true_shares(), assault.from_permuted_shares()
    rebuilt_undefended = rebuilt if baseline is assault else baseline.from_true_shares()
    guesses = blind_guesses(roles.auxiliary, len(private))
    if (drawn := assault.blind()) is not None:
        guesses["prior-sample"] = drawn

    names, originals = job.protocol.metrics, private.images()
    seed = seeding.derive(job.seed, "intervals")
    scores = score(names, rebuilt, originals, seed)
    undefended = score(names, rebuilt_undefended, originals, seed)
    permuted_scores = score(names, permuted, originals, seed)
    floor = _best_guess(names, guesses, roles.validation, originals, seed)

    cost = _cost(deployed.defense, reference.defense, private)
    over = _over_budget(job.protocol, cost)
    correct = _correct(deployed.defense, roles.private, job.protocol.batch)
    reference_correct = _correct(reference.defense, roles.private, job.protocol.batch)
    record = record.model_copy(
        update={
            "status": "success",
            "wall_seconds": round(time.monotonic() - began, 1),
            "manifest": content_id(private.hashes(), length=64),
            "adversary": assault.adversary,
            "scores": scores.summary,
            "undefended": undefended.summary,
            "prior_only": floor.summary,
            "permuted": permuted_scores.summary,
            "leakage": leakage_scores(scores, floor, undefended, seed),
            "utility": [
                accuracy_score("accuracy", correct, seed),
                accuracy_score("undefended accuracy", reference_correct, seed),
            ],
            "cost": cost,
            "deviations": record.deviations + over,
            "protocol": record.protocol.model_copy(
                update={"ranked": record.protocol.ranked and not over}
            ),
            "defense_facts": deployed.facts,
            "attack_facts": assault.attacker.facts(),
        }
    )
    return Result(
        record=record,
        originals=private,
        reconstructions=rebuilt,
        controls={"permuted": permuted, **guesses},
        per_image={
            **scores.columns(""),
            **undefended.columns("undefended_"),
            **permuted_scores.columns("permuted_"),
            **floor.columns("prior_only_"),
            "correct": correct[: len(private)],
        },
    )


def open_record(job: Job, device: str) -> Record:
    """Checks every name and parameter of a job and returns its record as ``started``.

    Raises:
        UnknownNameError: a name that no registry holds.
        InvalidParamsError: a parameter that its component refuses.
    """
    protocol, backbone = job.protocol, job.protocol.backbone
    granted = protocol.adversary.knowledge
    method = attacks.load(job.attack)
    if not granted.grants(method.knowledge):
        raise InvalidParamsError(
            f"attack {job.attack} needs {method.knowledge} knowledge, but protocol {protocol.id} "
            f"grants {granted}; choose another attack or protocol"
        )
    return Record(
        status="started",
        protocol=ProtocolId(
            id=protocol.id,
            content=protocol.content_id,
            track=protocol.track,
            ranked=protocol.ranked and not job.deviations(),
        ),
        defense=_component(defenses.load(job.defense), job.defense, job.defense_params),
        attack=_component(method, job.attack, job.merged_attack_params()),
        backbone=_component(backbones.load(backbone.name), backbone.name, backbone.params),
        seed=job.seed,
        deviations=job.deviations(),
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        provenance=provenance(device, protocol.threads),
    )


def fit(job: Job, roles: Roles, store: ArtifactStore, device: str) -> Deployed:
    """Trains the job's defense on the train role, or takes it from the cache."""
    rule = job.protocol.backbone
    spec = BackboneSpec(rule.name, rule.params, rule.split_point)
    split = spec.build(roles.train.image_shape, len(roles.class_names), job.seed)
    method = defenses.load(job.defense)
    params = build(method.Params, job.defense_params, f"defense {job.defense}")
    with seeding.stream(job.seed, "defense"), blaming(method, "__init__"):
        defense = method(split, params).to(device)

    def make(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], Facts]:
        seed = seeding.derive(job.seed, "fit")
        with blaming(method, "fit"):
            facts = defense.fit(roles.train, job.protocol.recipe, seed, checkpoint)
        return defense.state_dict(), facts

    artifact = store.fetch(
        "defense",
        {
            "defense": job.defense,
            "params": params.model_dump(mode="json"),
            "backbone": rule.model_dump(mode="json"),
            "recipe": job.protocol.recipe.model_dump(mode="json"),
            "train": roles.train.identity,
            "code": [fingerprint(c) for c in (method, type(split.backbone), Split, Defense, Step)],
            "seed": job.seed,
            "device": torch.device(device).type,
            "threads": job.protocol.threads,
        },
        make,
    )
    if artifact.reused:
        progress.note(f"reused the trained defense {job.defense} ({artifact.key[:8]})")
    defense.load_state_dict(artifact.tensors)
    defense.eval()
    return Deployed(defense.requires_grad_(requires_grad=False), artifact.key, artifact.facts)


def attack(
    job: Job, deployed: Deployed, roles: Roles, store: ArtifactStore, device: str
) -> Assault:
    """Prepares the attack against the worst coalition and sends the private images past it."""
    protocol = job.protocol
    adversary, screening = _worst_adversary(job, deployed, roles)
    target = Target(deployed.defense, adversary, deployed.identity)
    method = attacks.load(job.attack)
    params = build(method.Params, job.merged_attack_params(), f"attack {job.attack}")
    workshop = Workshop(
        roles.train.image_shape, job.seed, torch.device(device), store, protocol.threads
    )
    with seeding.stream(job.seed, "prepare"), blaming(method, "prepare"):
        attacker = method(params, workshop)
        attacker.prepare(target, roles.auxiliary, roles.validation)

    private = roles.private.take(protocol.data.attacked)
    sent = deployed.defense.transmit(private, protocol.batch, job.seed)
    return Assault(
        attacker=attacker,
        adversary=AdversaryFacts(
            knowledge=adversary.knowledge,
            corrupted=list(adversary.corrupted),
            screening=screening,
        ),
        shares=adversary.reads(sent),
        spec={
            **attacker.spec(),
            "target": target.identity,
            "auxiliary": roles.auxiliary.identity,
            "validation": roles.validation.identity,
            "private": private.identity,
            "batch": protocol.batch,
        },
        image_shape=private.image_shape,
        batch=protocol.batch,
    )


def _worst_adversary(
    job: Job, deployed: Deployed, roles: Roles
) -> tuple[Adversary, dict[str, float]]:
    """Screens all coalitions of the protocol's size by ridge regression and picks the worst."""
    rule, defense = job.protocol.adversary, deployed.defense
    size = min(rule.coalition, defense.servers)
    coalitions = list(itertools.combinations(range(defense.servers), size))
    if len(coalitions) == 1:
        return Adversary(rule.knowledge, coalitions[0]), {}
    learn, judge = roles.auxiliary.take(SCREENING_IMAGES), roles.validation
    sent = defense.transmit(learn, job.protocol.batch, seeding.derive(job.seed, "screening"))
    other = defense.transmit(judge, job.protocol.batch, seeding.derive(job.seed, "screened"))
    errors = {}
    with progress.task("Screening coalitions", total=len(coalitions)) as task:
        for coalition in coalitions:
            reader = Adversary(rule.knowledge, coalition)
            errors[coalition] = ridge_error(
                reader.reads(sent), learn.images(), reader.reads(other), judge.images(), job.seed
            )
            task.advance()
    worst = min(errors, key=errors.__getitem__)
    named = {"+".join(map(str, coalition)): error for coalition, error in errors.items()}
    return Adversary(rule.knowledge, worst), named


def _best_guess(
    names: tuple[str, ...],
    guesses: Mapping[str, Tensor],
    validation: ImageSet,
    originals: Tensor,
    seed: int,
) -> Scores:
    """Scores, for each metric, the guess that is best on the attacker's validation images."""
    count = min(len(originals), len(validation))
    known = validation.take(count).images()
    trials = {name: score(names, images[:count], known, seed) for name, images in guesses.items()}
    best = []
    for at, metric in enumerate(names):
        rated = {name: trial.summary[at] for name, trial in trials.items()}
        chosen = next(iter(guesses))
        for name, one in rated.items():
            better = (one.value or 0) - (rated[chosen].value or 0)
            if (better > 0) == one.higher_is_better and better != 0:
                chosen = name
        best.append(score((metric,), guesses[chosen], originals, seed).named(chosen))
    return Scores.joined(best)


@torch.no_grad()
def _correct(defense: Defense, images: ImageSet, batch: int) -> Tensor:
    """Whether each private image is classified correctly, randomness included (N,)."""
    device = next(defense.parameters()).device
    hits = []
    with seeding.stream(0, "utility"):
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            logits = defense(images.images(part).to(device))
            hits.append(logits.argmax(1).cpu() == images.labels[part])
    return torch.cat(hits).float()


def _over_budget(protocol: Protocol, cost: Cost) -> list[str]:
    limit = protocol.max_client_flops
    if limit is None or cost.client_flops <= limit:
        return []
    return [f"the client needs {cost.client_flops} FLOPs, above the protocol's {limit}"]


@torch.no_grad()
def _cost(defense: Defense, undefended: Defense, images: ImageSet) -> Cost:
    device = next(defense.parameters()).device
    example = images.images(slice(0, 1)).to(device)
    shares = defense.protect(example)
    replies = tuple(defense.serve(k, share) for k, share in enumerate(shares))
    return Cost(
        client_parameters=count_parameters(defense.client_modules()),
        client_flops=client_cost(lambda x: defense.fuse((defense.protect(x), replies)[1]), example),
        undefended_client_flops=client_cost(undefended.protect, example),
        bytes_up=bytes_on_wire(shares),
        bytes_down=bytes_on_wire(replies),
        values_per_server=[share[0].numel() for share in shares],
        image_values=example[0].numel(),
    )


def _component(cls: type, name: str, values: Mapping[str, Json]) -> Component:
    kind = {Defense: "defense", Attack: "attack"}
    owner = next((word for base, word in kind.items() if issubclass(cls, base)), "backbone")
    params = build(cls.Params, values, f"{owner} {name}")  # type: ignore[attr-defined]
    return Component(
        name=cls.name,  # type: ignore[attr-defined]
        version=cls.version,  # type: ignore[attr-defined]
        code=fingerprint(cls),
        params=params.model_dump(mode="json"),
    )


def _merge(below: Mapping[str, Json], above: Mapping[str, Json]) -> dict[str, Json]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(under, value) if both else value  # type: ignore[arg-type]
    return merged
