"""An attack with its controls and their scores, and the worst case of several attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mibench import seeding
from mibench.artifacts import ArtifactStore
from mibench.assault import attack
from mibench.controls import best_guess, blind_guesses
from mibench.data.roles import Roles
from mibench.deployment import Deployed
from mibench.exhibit import Case
from mibench.files import Json
from mibench.gallery import FIRST_CHOICE
from mibench.job import UNDEFENDED, Job
from mibench.record import AdversaryFacts, Calibration, Convergence, Score, SuitePart
from mibench.scoring import Scores, gained, leakage_scores, score, score_sets, worst_of
from mibench.stored import rounded

CONVERGED = {"psnr": 0.5, "ssim": 0.02}
"""What twice the budget may change at most, by metric, of an attack that has converged."""


@dataclass(frozen=True)
class Images:
    """What an attack made, rounded to the 8 bits in which it is stored: what is stored is scored.

    Attributes:
        reconstructions: (N, 3, H, W) in [0, 1].
        undefended: the same attack's on the undefended split.
        permuted: the control: made of another image's shares.
        guesses: the control: blind guesses by name.
    """

    reconstructions: Tensor
    undefended: Tensor
    permuted: Tensor
    guesses: dict[str, Tensor]

    def sets(self) -> dict[str, Tensor]:
        """What is looked at as a whole."""
        return {"attack": self.reconstructions, "undefended": self.undefended}

    def controls(self) -> dict[str, Tensor]:
        """The controls by name."""
        return {"permuted": self.permuted, **self.guesses}


@dataclass(frozen=True)
class Judged:
    """Scores of an attack's images with those of its controls.

    Attributes:
        scores: of the reconstructions.
        undefended: of the same attack on the undefended split.
        permuted: of the control.
        floor: of the best blind guess.
    """

    scores: Scores
    undefended: Scores
    permuted: Scores
    floor: Scores


@dataclass(frozen=True)
class Worst:
    """The most harmful of several attacks, for each image and metric on its own.

    Attributes:
        judged: the scores.
        chosen: by metric, the attack that each image's value comes from.
        permuted: the same for the control of permuted shares.
        credited: by metric, the share of the images for which each attack was the worst.
    """

    judged: Judged
    chosen: Mapping[str, list[str]]
    permuted: Mapping[str, list[str]]
    credited: Mapping[str, Mapping[str, float]]

    def shares(self, name: str) -> dict[str, float]:
        """By metric, the share of the images for which this attack was the worst."""
        return {metric: shares[name] for metric, shares in self.credited.items()}

    def shown(self, images: Mapping[str, Tensor]) -> Tensor:
        """Of each image the worst reconstruction (N, 3, H, W), by the metric to look at."""
        return _picked(images, self.chosen)

    def shown_control(self, images: Mapping[str, Tensor]) -> Tensor:
        """Of each image the worst control of permuted shares."""
        return _picked(images, self.permuted)


@dataclass(frozen=True)
class Strike:
    """What one attack, or the worst of several, made of the private images.

    Attributes:
        adversary: who attacked.
        facts: what the preparation reached.
        reconstructions: images (N, 3, H, W) in [0, 1].
        permuted: the control: made of another image's shares.
        guesses: the control: blind guesses by name.
        undefended_images: the same attack's on the undefended split; of the worst of several, None,
            since each metric has its own worst.
        scores: of the reconstructions.
        undefended: of the same attack on the undefended split.
        permuted_scores: of the control.
        distribution: what the reconstructions have as a set, on the defense and undefended.
        floor: of the best blind guess.
        calibration: whether the attack is as strong as it should be.
        convergence: whether twice the budget gains anything; None where that was not asked for.
        seconds_per_image: that the reconstruction took when it was made.
        suite: what each attack did alone, where there are several.
        parts: their per-image values.
    """

    adversary: AdversaryFacts
    facts: dict[str, Json]
    reconstructions: Tensor
    permuted: Tensor
    guesses: dict[str, Tensor]
    undefended_images: Tensor | None
    scores: Scores
    undefended: Scores
    permuted_scores: Scores
    floor: Scores
    distribution: list[Score]
    calibration: list[Calibration]
    convergence: list[Convergence] | None
    seconds_per_image: float
    suite: list[SuitePart] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)

    def leakage(self, seed: int) -> list[Score]:
        """Normalised leakage per metric."""
        return leakage_scores(self.scores, self.floor, self.undefended, seed)

    @property
    def judged(self) -> Judged:
        """All scores together."""
        return Judged(self.scores, self.undefended, self.permuted_scores, self.floor)

    def columns(self) -> dict[str, Tensor]:
        """The per-image values of everything that was scored."""
        return {
            **self.scores.columns(""),
            **self.undefended.columns("undefended_"),
            **self.permuted_scores.columns("permuted_"),
            **self.floor.columns("prior_only_"),
            **self.parts,
        }


def strike(
    job: Job,
    deployed: Deployed,
    reference: Deployed,
    roles: Roles,
    case: Case,
    store: ArtifactStore,
    device: str,
) -> Strike:
    """Makes one attack, on the defense and on the undefended split, with the controls.

    Args:
        job: names a single attack.
        deployed: the trained defense.
        reference: the trained undefended split.
        roles: the images.
        case: what the reconstructions are held against.
        store: cache of trained parts.
        device: a PyTorch device.
    """
    bare = job.defense == UNDEFENDED
    assault = attack(job, deployed, roles, store, device)
    baseline = assault if bare else attack(job.undefended(), reference, roles, store, device)

    rebuilt = rounded(assault.from_true_shares())
    own = {name: rounded(guess) for name, guess in assault.blind().items()}
    images = Images(
        reconstructions=rebuilt,
        undefended=rebuilt if bare else rounded(baseline.from_true_shares()),
        permuted=rounded(assault.from_permuted_shares()),
        guesses=blind_guesses(roles.auxiliary, len(roles.attacked)) | own,
    )
    names, seed = tuple(job.protocol.metrics), interval_seed(job.seed)
    found = judged(names, images, case, seed)
    convergence = None
    if job.converge:
        gains: dict[str, float] = {}
        if job.budget():
            again = attack(job.doubled(), deployed, roles, store, device).from_true_shares()
            gains = gained(found.scores, score(names, rounded(again), case.attacked, seed))
        convergence = [_convergence(job, gains)]
    return Strike(
        adversary=assault.adversary,
        facts=assault.attacker.facts(),
        reconstructions=rebuilt,
        permuted=images.permuted,
        guesses=images.guesses,
        undefended_images=images.undefended,
        scores=found.scores,
        undefended=found.undefended,
        permuted_scores=found.permuted,
        floor=found.floor,
        distribution=score_sets(images.sets(), case.attacked.originals, seed, device),
        calibration=calibration(
            job.attack, found.undefended, job.protocol.references.get(job.built_in)
        ),
        convergence=convergence,
        seconds_per_image=assault.seconds["true"] / len(rebuilt),
    )


def judged(names: Sequence[str], images: Images, case: Case, seed: int) -> Judged:
    """Scores an attack's images and those of its controls, against the attacked images."""
    return Judged(
        scores=score(names, images.reconstructions, case.attacked, seed),
        undefended=score(names, images.undefended, case.attacked, seed),
        permuted=score(names, images.permuted, case.attacked, seed),
        floor=best_guess(names, images.guesses, case, seed),
    )


def worst_judged(
    parts: Mapping[str, Judged],
    guesses: Mapping[str, Tensor],
    names: Sequence[str],
    case: Case,
    seed: int,
) -> Worst:
    """Takes, for each image and metric, the most harmful of several attacks; for controls as well.

    A maximum over several guesses is higher than each of them, even for a blind one. So the control
    and the undefended split get the same maximum over the same attacks.

    Args:
        parts: scores of the same images, by attack.
        guesses: all blind guesses by name.
        names: of the metrics.
        case: what the reconstructions are held against.
        seed: of the intervals.
    """
    worst = worst_of({name: one.scores for name, one in parts.items()}, seed)
    undefended = worst_of({name: one.undefended for name, one in parts.items()}, seed)
    permuted = worst_of({name: one.permuted for name, one in parts.items()}, seed)
    floor = best_guess(names, guesses, case, seed)
    together = Judged(worst.scores, undefended.scores, permuted.scores, floor)
    return Worst(together, worst.chosen, permuted.chosen, worst.shares)


def worst_case(
    strikes: Mapping[str, Strike], left_out: Mapping[str, str], job: Job, case: Case, device: str
) -> Strike:
    """Takes, for each image and metric, the most harmful of several attacks; for controls as well.

    Args:
        strikes: by attack, on the same images.
        left_out: attacks that do not apply to the defense, with the reason.
        job: the suite's.
        case: what the reconstructions are held against.
        device: a PyTorch device.
    """
    guesses = {name: images for one in strikes.values() for name, images in one.guesses.items()}
    seed = interval_seed(job.seed)
    found = worst_judged(
        {name: one.judged for name, one in strikes.items()},
        guesses,
        tuple(job.protocol.metrics),
        case,
        seed,
    )
    rebuilt = found.shown({k: one.reconstructions for k, one in strikes.items()})
    asked = [one.convergence for one in strikes.values() if one.convergence is not None]
    return Strike(
        adversary=_together([one.adversary for one in strikes.values()]),
        facts={},
        reconstructions=rebuilt,
        permuted=found.shown_control({k: one.permuted for k, one in strikes.items()}),
        guesses=guesses,
        undefended_images=None,
        scores=found.judged.scores,
        undefended=found.judged.undefended,
        permuted_scores=found.judged.permuted,
        floor=found.judged.floor,
        distribution=score_sets({"attack": rebuilt}, case.attacked.originals, seed, device),
        # Of several coalitions, each met the same undefended split.
        calibration=list(
            {entry.attack: entry for one in strikes.values() for entry in one.calibration}.values()
        ),
        convergence=[entry for entries in asked for entry in entries] if asked else None,
        seconds_per_image=sum(one.seconds_per_image for one in strikes.values()),
        suite=[
            *(_part(name, one, found.shares(name)) for name, one in strikes.items()),
            *(SuitePart(attack=name, reason=reason) for name, reason in left_out.items()),
        ],
        parts={
            name: values
            for attacker, one in strikes.items()
            for name, values in one.scores.columns(f"{attacker}_").items()
        },
    )


def interval_seed(seed: int) -> int:
    """Seed of the bootstrap, the same for everything in a record of this seed."""
    return seeding.derive(seed, "intervals")


def calibration(attack: str, undefended: Scores, reference: float | None) -> list[Calibration]:
    """Whether an attack reaches its reference on the undefended split; empty without a PSNR."""
    found = [score.value for score in undefended.summary if score.metric == "psnr"]
    if not found or found[0] is None:
        return []
    return [
        Calibration(
            attack=attack,
            reached=found[0],
            reference=reference,
            calibrated=None if reference is None else found[0] >= reference,
        )
    ]


def _together(adversaries: Sequence[AdversaryFacts]) -> AdversaryFacts:
    """The adversary of several strikes: one for all, or all coalitions of the protocol's size."""
    first = adversaries[0]
    coalitions = [one.corrupted for one in adversaries]
    distinct = [one for at, one in enumerate(coalitions) if one not in coalitions[:at]]
    if len(distinct) == 1:
        return first
    worst = min(first.screening, key=first.screening.__getitem__)
    return first.model_copy(
        update={
            "corrupted": [int(server) for server in worst.split("+")],
            "coalitions": distinct,
            "broken": max(one.broken for one in adversaries),
        }
    )


def _part(name: str, one: Strike, worst: Mapping[str, float]) -> SuitePart:
    return SuitePart.model_validate(
        {
            "attack": name,
            "corrupted": one.adversary.corrupted,
            "scores": one.scores.summary,
            "share_of_worst": worst,
            "seconds_per_image": one.seconds_per_image,
            "facts": one.facts,
        }
    )


def _picked(images: Mapping[str, Tensor], chosen: Mapping[str, list[str]]) -> Tensor:
    shown = FIRST_CHOICE if FIRST_CHOICE in chosen else next(iter(chosen))
    return torch.stack([images[name][at] for at, name in enumerate(chosen[shown])])


def settled(gains: dict[str, float]) -> bool | None:
    """Whether all changes are small; None where nothing was scored that could tell."""
    known = {name: gains[name] for name in CONVERGED if name in gains}
    return all(abs(gains[name]) <= CONVERGED[name] for name in known) if known else None


def _convergence(job: Job, gains: dict[str, float]) -> Convergence:
    before, after = job.budget(), job.doubled().budget()
    return Convergence(
        attack=job.label,
        budget={key: (value, after[key]) for key, value in before.items()},
        gained=gains,
        converged=settled(gains) if before else True,
    )
