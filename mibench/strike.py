"""An attack with its controls and their scores, and the worst case of several attacks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mibench import seeding
from mibench.artifacts import ArtifactStore
from mibench.assault import attack
from mibench.controls import best_guess, blind_guesses
from mibench.data.roles import Roles
from mibench.deployment import Deployed
from mibench.files import Json
from mibench.gallery import FIRST_CHOICE
from mibench.job import UNDEFENDED, Job
from mibench.record import AdversaryFacts, Calibration, Convergence, Score, SuitePart
from mibench.scoring import Scores, gained, leakage_scores, score, worst_of

CONVERGED = {"psnr": 0.5, "ssim": 0.02}
"""What twice the budget may change at most, by metric, of an attack that has converged."""


@dataclass(frozen=True)
class Strike:
    """What one attack, or the worst of several, made of the private images.

    Attributes:
        adversary: who attacked.
        facts: what the preparation reached.
        reconstructions: images (N, 3, H, W) in [0, 1].
        permuted: the control: made of another image's shares.
        guesses: the control: blind guesses by name.
        scores: of the reconstructions.
        undefended: of the same attack on the undefended split.
        permuted_scores: of the control.
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
    scores: Scores
    undefended: Scores
    permuted_scores: Scores
    floor: Scores
    calibration: list[Calibration]
    convergence: list[Convergence] | None
    seconds_per_image: float
    suite: list[SuitePart] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)

    def leakage(self, seed: int) -> list[Score]:
        """Normalised leakage per metric."""
        return leakage_scores(self.scores, self.floor, self.undefended, seed)

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
    store: ArtifactStore,
    device: str,
) -> Strike:
    """Makes one attack, on the defense and on the undefended split, with the controls.

    Args:
        job: names a single attack.
        deployed: the trained defense.
        reference: the trained undefended split.
        roles: the images.
        store: cache of trained parts.
        device: a PyTorch device.
    """
    bare = job.defense == UNDEFENDED
    assault = attack(job, deployed, roles, store, device)
    baseline = assault if bare else attack(job.undefended(), reference, roles, store, device)

    rebuilt = assault.from_true_shares()
    permuted = assault.from_permuted_shares()
    rebuilt_undefended = rebuilt if bare else baseline.from_true_shares()
    guesses = blind_guesses(roles.auxiliary, len(roles.attacked)) | assault.blind()

    names, originals = tuple(job.protocol.metrics), roles.attacked.images()
    seed = interval_seed(job)
    scores = score(names, rebuilt, originals, seed)
    undefended = score(names, rebuilt_undefended, originals, seed)
    convergence = None
    if job.converge:
        gains: dict[str, float] = {}
        if job.budget():
            again = attack(job.doubled(), deployed, roles, store, device).from_true_shares()
            gains = gained(scores, score(names, again, originals, seed))
        convergence = [_convergence(job, gains)]
    return Strike(
        adversary=assault.adversary,
        facts=assault.attacker.facts(),
        reconstructions=rebuilt,
        permuted=permuted,
        guesses=guesses,
        scores=scores,
        undefended=undefended,
        permuted_scores=score(names, permuted, originals, seed),
        floor=best_guess(names, guesses, roles.validation, originals, seed),
        calibration=_calibration(job, undefended),
        convergence=convergence,
        seconds_per_image=assault.seconds["true"] / len(rebuilt),
    )


def worst_case(
    strikes: Mapping[str, Strike], left_out: Mapping[str, str], job: Job, roles: Roles
) -> Strike:
    """Takes, for each image and metric, the most harmful of several attacks; for controls as well.

    A maximum over several guesses is higher than each of them, even for a blind one. So the control
    and the undefended split get the same maximum over the same attacks.

    Args:
        strikes: by attack, on the same images.
        left_out: attacks that do not apply to the defense, with the reason.
        job: the suite's.
        roles: the images.
    """
    seed, originals = interval_seed(job), roles.attacked.images()
    scores, chosen = worst_of({k: one.scores for k, one in strikes.items()}, seed)
    undefended, _ = worst_of({k: one.undefended for k, one in strikes.items()}, seed)
    permuted, other = worst_of({k: one.permuted_scores for k, one in strikes.items()}, seed)
    shown = FIRST_CHOICE if FIRST_CHOICE in chosen else next(iter(chosen))
    guesses = {name: images for one in strikes.values() for name, images in one.guesses.items()}
    asked = [one.convergence for one in strikes.values() if one.convergence is not None]
    return Strike(
        adversary=next(iter(strikes.values())).adversary,
        facts={},
        reconstructions=_picked(
            {k: one.reconstructions for k, one in strikes.items()}, chosen[shown]
        ),
        permuted=_picked({k: one.permuted for k, one in strikes.items()}, other[shown]),
        guesses=guesses,
        scores=scores,
        undefended=undefended,
        permuted_scores=permuted,
        floor=best_guess(tuple(job.protocol.metrics), guesses, roles.validation, originals, seed),
        calibration=[entry for one in strikes.values() for entry in one.calibration],
        convergence=[entry for entries in asked for entry in entries] if asked else None,
        seconds_per_image=sum(one.seconds_per_image for one in strikes.values()),
        suite=[
            *(_part(name, one, chosen) for name, one in strikes.items()),
            *(SuitePart(attack=name, reason=reason) for name, reason in left_out.items()),
        ],
        parts={
            name: values
            for attacker, one in strikes.items()
            for name, values in one.scores.columns(f"{attacker}_").items()
        },
    )


def interval_seed(job: Job) -> int:
    """Seed of the bootstrap, the same for everything in a record."""
    return seeding.derive(job.seed, "intervals")


def _part(name: str, one: Strike, chosen: Mapping[str, list[str]]) -> SuitePart:
    worst = {metric: names.count(name) / len(names) for metric, names in chosen.items()}
    return SuitePart.model_validate(
        {
            "attack": name,
            "scores": one.scores.summary,
            "share_of_worst": worst,
            "seconds_per_image": one.seconds_per_image,
            "facts": one.facts,
        }
    )


def _picked(images: Mapping[str, Tensor], chosen: list[str]) -> Tensor:
    return torch.stack([images[name][at] for at, name in enumerate(chosen)])


def _calibration(job: Job, undefended: Scores) -> list[Calibration]:
    found = [score.value for score in undefended.summary if score.metric == "psnr"]
    if not found or found[0] is None:
        return []
    reference = job.protocol.references.get(job.built_in)
    return [
        Calibration(
            attack=job.attack,
            reached=found[0],
            reference=reference,
            calibrated=None if reference is None else found[0] >= reference,
        )
    ]


def settled(gains: dict[str, float]) -> bool | None:
    """Whether all changes are small; None where nothing was scored that could tell."""
    known = {name: gains[name] for name in CONVERGED if name in gains}
    return all(abs(gains[name]) <= CONVERGED[name] for name in known) if known else None


def _convergence(job: Job, gains: dict[str, float]) -> Convergence:
    before, after = job.budget(), job.doubled().budget()
    return Convergence(
        attack=job.attack,
        budget={key: (value, after[key]) for key, value in before.items()},
        gained=gains,
        converged=settled(gains) if before else True,
    )
