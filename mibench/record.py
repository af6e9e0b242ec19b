"""The result record: one JSON file per (defense, attack, protocol, seed).

When a field is added or changes its meaning, raise `FORMAT` and teach `read_record` the old one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from mibench.errors import RecordError
from mibench.files import content_id, pretty_json

FORMAT = 4
"""Version of the format that this code writes."""
CONTROLLED = 4
"""First format in which a finished record without its controls is no record."""
CONTROLS = ("undefended", "prior_only", "permuted")
"""What stands beside every score of an attack, computed on the same images."""
PLACES = {"scores": "", **{name: f"{name}_" for name in CONTROLS}}
"""Fields with one score per metric, and the prefix of their columns in ``per_image.parquet``."""


ESSENTIAL = (
    "data", "manifest", "adversary", "scores", *CONTROLS, "leakage", "utility", "cost",
)  # fmt: skip
"""What a finished record holds."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Component(_Part):
    """A defense, attack or backbone with its parameters, defaults spelled out.

    ``location`` is where a plugin was taken from, as its user named it (``./file.py:Class``); null
    where a registry knows the name.
    """

    name: str
    version: int
    code: str
    params: dict[str, JsonValue]
    location: str | None = None


class Score(_Part):
    """One number with its interval; ``value`` is null only when ``reason`` says why.

    Attributes:
        metric: its name.
        version: of the metric's definition.
        unit: empty for a pure number.
        higher_is_better: whether a higher value means more of the private image.
        value: the mean over images, or the one number of a metric that has none per image.
        ci_low: lower end of the 95 % interval.
        ci_high: upper end.
        n: images that it rests on.
        p50: the median over images; this and the next two are null before format 4, and where there
            are no values per image.
        p95: what 5 % of the images exceed, in the direction of leakage: for a metric that falls as
            more leaks, 5 % lie below.
        worst: the most harmful image's.
        source: what was scored, where that is not plain from the place of the score.
        reason: why there is no value, or no interval.
    """

    metric: str
    version: int
    unit: str
    higher_is_better: bool
    value: float | None
    ci_low: float | None
    ci_high: float | None
    n: int
    p50: float | None = None
    p95: float | None = None
    worst: float | None = None
    source: str | None = None
    reason: str | None = None

    @model_validator(mode="after")
    def _explained(self) -> Score:
        if self.value is None and self.reason is None:
            raise ValueError("a score without a value must give the reason")
        return self


class ProtocolId(_Part):
    """Which protocol: its id, the hash of its content, and all that it fixes (from format 2 on)."""

    id: str
    content: str
    track: str
    ranked: bool
    values: dict[str, JsonValue] = {}


class AdversaryFacts(_Part):
    """Who attacked: knowledge, the servers read, and the screening that chose them.

    ``transmissions`` is how often each private image was sent, ``auxiliary`` what the attacker's
    images have to do with the training images (``training``, ``disjoint`` or ``other``).
    ``screening`` gives, for every coalition of that size, the ridge regression's mean squared error
    on the attacker's validation images; the coalition with the least error is attacked. ``broken``
    counts the attacked images whose message held values that are infinite or not a number; each
    of those was read as the mean of the others in its place. ``coalitions`` is empty where the
    coalition with the least error alone was attacked; else it lists those that were attacked
    instead: all of that size, or the one that was chosen by hand.
    """

    knowledge: str
    corrupted: list[int]
    transmissions: int = 1
    auxiliary: str = "disjoint"
    screening: dict[str, float]
    broken: int = 0
    coalitions: list[list[int]] = []

    @property
    def worst(self) -> tuple[int, ...]:
        """The coalition that the screening found worst; without a screening, the one that reads."""
        if not self.screening:
            return tuple(self.corrupted)
        return tuple(map(int, min(self.screening, key=self.screening.__getitem__).split("+")))


class DataFacts(_Part):
    """Which images were used.

    Attributes:
        dataset: name of the dataset.
        image_size: side in pixels.
        images: number of images by role, and how many were ``attacked``.
        identities: hash over all images and labels in order, by role.
        left_out: images of a role that were left out since they are private ones as well.
    """

    dataset: str
    image_size: int
    images: dict[str, int]
    identities: dict[str, str]
    left_out: dict[str, int]


class AttributeScore(_Part):
    """How well one yes-or-no attribute is told; balanced is null where all images share a value."""

    name: str
    accuracy: float
    balanced_accuracy: float | None
    undefended_accuracy: float
    undefended_balanced_accuracy: float | None


class Cost(_Part):
    """What the defense costs per image. FLOPs count two per multiply-add.

    Attributes:
        client_parameters: of all that runs on the client.
        client_flops: of protection and fusion.
        undefended_client_flops: of the plain client.
        bytes_up: of all shares, as they are sent.
        bytes_down: of all replies.
        values_per_server: numbers that each server receives.
        image_values: numbers in an image.
        peak_activation_bytes: most memory that tensors of the client's forward pass hold at once,
            parameters left out; null before format 4, and so are the next two.
        latency_ratio: how many times as long the client takes as the undefended client, both
            measured by turns in this run, with an interval over the turns.
        training_seconds: that the training of the defense took when it was made.
    """

    client_parameters: int
    client_flops: int
    undefended_client_flops: int
    bytes_up: int
    bytes_down: int
    values_per_server: list[int]
    image_values: int
    peak_activation_bytes: int | None = None
    latency_ratio: Score | None = None
    training_seconds: float | None = None


class JudgeFacts(_Part):
    """Who told what a reconstruction shows: a classifier that neither side has trained with.

    Attributes:
        artifact: key of the trained judge in the cache.
        weights: hash of its weights; scores of different judges do not compare.
        backbone: its architecture.
        trained_on: the role whose images it has learned from.
        accuracy: its share of right answers on the attacked originals; what recognition can reach.
        gallery: images among which the original is sought.
    """

    artifact: str
    weights: str
    backbone: Component
    trained_on: str
    accuracy: float
    gallery: int


class Calibration(_Part):
    """Whether an attack is as strong as it should be, by its PSNR in dB on the undefended split.

    Attributes:
        attack: its name.
        reached: mean PSNR in this run.
        reference: what the protocol asks for; null where it has no reference for this attack.
        calibrated: whether that was reached; null without a reference.
    """

    attack: str
    reached: float
    reference: float | None
    calibrated: bool | None


class Convergence(_Part):
    """What an attack gains from twice its budget.

    Attributes:
        attack: its name.
        budget: the parameters that were doubled, each with its value before and after.
        gained: by metric, how much more leaked with twice the budget, in the metric's unit.
        converged: whether no metric changed by more than `strike.CONVERGED` allows; null where none
            of those was scored.
    """

    attack: str
    budget: dict[str, tuple[JsonValue, JsonValue]]
    gained: dict[str, float]
    converged: bool | None


class SuitePart(_Part):
    """One attack of a suite, or of one of several coalitions.

    Attributes:
        attack: its name; of several coalitions each has its own part, such as ``decoder@0+2``.
        corrupted: the servers that it read; empty before there were several coalitions.
        scores: of its reconstructions; empty where it does not apply to the defense.
        reason: why it does not apply.
        share_of_worst: by metric, the share of the images for which it was the worst; attacks
            that are equally bad for an image share it.
        seconds_per_image: see `Record`.
        facts: what its preparation reached.
    """

    attack: str
    corrupted: list[int] = []
    scores: list[Score] = []
    reason: str | None = None
    share_of_worst: dict[str, float] = {}
    seconds_per_image: float | None = None
    facts: dict[str, JsonValue] = {}

    @model_validator(mode="after")
    def _explained(self) -> SuitePart:
        if not self.scores and self.reason is None:
            raise ValueError("an attack of a suite without scores must give the reason")
        return self


class Record(_Part):
    """The result of one run.

    Attributes:
        format_version: version of this format.
        status: ``started`` while it runs (or was killed), ``success`` or ``error``.
        error: what went wrong, for ``error``.
        deviations: how the run departs from its protocol; a run that departs is not ranked.
        data: which images were used; null in records of format 1.
        manifest: SHA-256 of the file ``manifest.txt``: the hashes of all private images, one per
            line, in order. Two rows with the same manifest attacked the same images. (In format 1:
            over the attacked images alone.)
        scores: the attack on the defense. Of reconstructions against originals, so that "better"
            means nearer to the original, which is worse for privacy.
        undefended: the same attack on the undefended split.
        prior_only: the best blind guess, per metric; ``source`` names the guess.
        permuted: the attack on other images' shares.
        leakage: normalised: 0 is a blind guess, 1 is the undefended split.
        utility: accuracy of the defended and of the undefended model on all private images, and of
            the defended one on the validation images; for a dataset of attributes, the share of
            rightly told attributes, and balanced accuracies beside it.
        attributes: the same for each attribute of such a dataset, on all private images.
        calibration: one entry for each attack whose PSNR was computed; empty before format 3.
        convergence: one entry for each attack; null where it was not asked for.
        suite: of a suite, or of every coalition, what each of its attacks did alone.
        distribution: scores that a set of reconstructions has as a whole, such as FID.
        information: what the shares of the worst coalition tell, whatever the attack, on images of
            the attacker; one score per measure.
        information_undefended: the same of the undefended split, to compare with.
        information_facts: what a measure notes beside its number, by measure, such as the value of
            each seed.
        judge: who recognised the images; null where the protocol has no judge.
        near_copies: by role, attacked images of which that role holds a near copy, such as the same
            picture mirrored or encoded anew.
        supersedes: id of the record that this one was scored anew from.
        seconds_per_image: that the reconstruction took when it was made, batched; what came before
            it, such as the training of a decoder, is not in it. Of a suite, the sum.
    """

    format_version: int = FORMAT
    status: Literal["started", "success", "error"]
    error: str | None = None
    protocol: ProtocolId
    defense: Component
    attack: Component
    backbone: Component
    seed: int
    deviations: list[str]
    started: str
    wall_seconds: float | None = None
    data: DataFacts | None = None
    manifest: str | None = None
    adversary: AdversaryFacts | None = None
    scores: list[Score] = []
    undefended: list[Score] = []
    prior_only: list[Score] = []
    permuted: list[Score] = []
    leakage: list[Score] = []
    utility: list[Score] = []
    attributes: list[AttributeScore] = []
    calibration: list[Calibration] = []
    convergence: list[Convergence] | None = None
    suite: list[SuitePart] = []
    distribution: list[Score] = []
    information: list[Score] = []
    information_undefended: list[Score] = []
    information_facts: dict[str, JsonValue] = {}
    judge: JudgeFacts | None = None
    near_copies: dict[str, int] = {}
    supersedes: str | None = None
    seconds_per_image: float | None = None
    cost: Cost | None = None
    defense_facts: dict[str, JsonValue] = {}
    attack_facts: dict[str, JsonValue] = {}
    files: dict[str, str] = {}
    provenance: dict[str, JsonValue]

    @model_validator(mode="after")
    def _controlled(self) -> Record:
        """A finished run without its controls is not a record."""
        if self.status != "success" or self.format_version < CONTROLLED:
            return self
        missing = [name for name in ESSENTIAL if getattr(self, name) in (None, [])]
        if missing:
            raise ValueError(f"a finished record must hold {', '.join(missing)}")
        wanted = [score.metric for score in self.scores]
        for control in CONTROLS:
            found = [score.metric for score in getattr(self, control)]
            if found != wanted:
                raise ValueError(f"{control} must hold the same metrics as scores, not {found}")
        found = [score.metric for score in self.leakage]
        if found != [f"leakage({name})" for name in wanted]:
            raise ValueError(f"leakage must follow the metrics of scores, not {found}")
        for at, score in enumerate(self.scores):
            for control in CONTROLS:
                beside = getattr(self, control)[at]
                if (beside.value is None) != (score.value is None) or beside.n != score.n:
                    raise ValueError(
                        f"{control} of {score.metric} must be computed on the same images as the "
                        "score itself"
                    )
        return self

    @property
    def id(self) -> str:
        """Hash of the content; names the record."""
        return content_id(self.model_dump(mode="json"))

    def completed(self, **results: object) -> Record:
        """Returns this record with the results of a run that succeeded, checked like any other."""
        known = {name: getattr(self, name) for name in type(self).model_fields}
        return Record(**{**known, "status": "success", **results})

    def to_json(self) -> bytes:
        """Returns the record as canonical, indented JSON."""
        return pretty_json(self.model_dump(mode="json"))


def read_record(path: Path) -> Record:
    """Reads a record from a file, or from ``record.json`` in a folder.

    Raises:
        RecordError: there is none, it is broken, or a newer mibench wrote it.
    """
    path = path / "record.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecordError(f"no record at {path}; give the folder that a run has written") from error
    except RecursionError as error:
        raise RecordError(f"{path} is not a readable record (nested too deeply)") from error
    except (OSError, ValueError) as error:
        raise RecordError(f"{path} is not a readable record ({error})") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise RecordError(f"{path} is not a mibench record: it has no format_version")
    if version > FORMAT:
        raise RecordError(
            f"{path} has format version {version}, but this mibench reads up to {FORMAT}; "
            "install a newer mibench"
        )
    try:
        return Record.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RecordError(f"{path} is not a valid record: {where}: {first['msg']}") from error
