"""Protocols: everything that must be equal for two results to be comparable.

A protocol is a YAML file read into a frozen model. An unknown key is an error that names the
nearest key, and the content id hashes every value that can change a result.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from mibench.errors import InvalidParamsError, UnknownNameError
from mibench.files import Json, canonical_json, content_id
from mibench.params import Parameters, build, merged, parse_yaml
from mibench.suggest import unknown
from mibench.threat import Knowledge

SSIM_WINDOW = 11
"""Side of SSIM's window in pixels."""
JUDGED_SIDE = 8
"""Side in pixels of the smallest images that a judge can look at."""
ROLES = ("train", "auxiliary", "validation", "private")
UNRECORDED = {"title", "references", "minutes"}
"""Fields of a protocol that change no number of a record."""
SILENT = UNRECORDED | {"metrics", "judge"}
"""Fields of a protocol that its content id does not see.

Scores carry the versions of their metrics and a record names its judge: a record that is scored
anew, or with more metrics, stays under the protocol that its run was made under.
"""
METRICS = {
    "mse": 1, "psnr": 1, "ssim": 1, "lpips": 1,
    "recognition": 1, "reid-top1": 1, "reid-top5": 1, "reid-mrr": 1,
}  # fmt: skip
"""Scores of a protocol that names none, with their versions."""
Auxiliary = Literal["training", "disjoint", "other"]
"""The attacker's images: the training images themselves, others of the same kind, another kind."""


class RoleRule(Parameters):
    """Which images play a role: a range of a split, or all whose hash falls into an interval.

    Attributes:
        split: the split of the source.
        start: first image of a range, in the source's own order.
        count: number of images; with ``hashed``, the largest number (null: all).
        hashed: interval [low, high) of [0, 1); the SHA-256 of an image says where it lies. Gives
            disjoint roles in a folder that has no order of its own, copies included.
        dataset: another dataset than the protocol's, for an attacker without images of the same
            kind.
        identity: hash over the images and labels that are meant, in order; others depart from the
            protocol. Null where the whole dataset was not at hand when the protocol was made.
    """

    split: str = Field(pattern=r"^[\w.-]+$")
    start: int = Field(default=0, ge=0, lt=2**40)
    count: int | None = Field(default=None, gt=0, lt=2**40)
    hashed: tuple[float, float] | None = None
    dataset: str | None = None
    identity: str | None = Field(default=None, pattern="^[0-9a-f]{16}$")

    @model_validator(mode="after")
    def _whole(self) -> RoleRule:
        if self.hashed is None and self.count is None:
            raise ValueError("needs a count, or an interval 'hashed'")
        if self.hashed is not None:
            low, high = self.hashed
            if self.start or not 0 <= low < high <= 1:
                raise ValueError("'hashed' is an interval [low, high) inside [0, 1], without start")
        return self

    def overlaps(self, other: RoleRule) -> bool:
        """Says whether both rules can choose a common image of one source."""
        if self.split != other.split or self.dataset != other.dataset:
            return False
        if self.hashed is not None and other.hashed is not None:
            return self.hashed[0] < other.hashed[1] and other.hashed[0] < self.hashed[1]
        if self.count is None or other.count is None or self.hashed or other.hashed:
            return True  # a range and an interval of hashes know nothing of each other
        return self.start < other.start + other.count and other.start < self.start + self.count


class DataRule(Parameters):
    """The dataset and its four roles; the first ``attacked`` private images are attacked.

    The roles are disjoint, but for one choice: the auxiliary images may be training images, see
    `strength`.

    Attributes:
        dataset: name of the dataset, or a path with a separator to a folder of one's own.
        image_size: side of the square images in pixels.
        train: trains the model and its defense.
        auxiliary: the attacker's own images, to learn from.
        validation: the attacker's own images, to choose with.
        private: the users' images; accuracy is measured on all of them.
        attacked: number of private images that are attacked, the first ones.
    """

    dataset: str
    image_size: int = Field(gt=0, le=2048)
    train: RoleRule
    auxiliary: RoleRule
    validation: RoleRule
    private: RoleRule
    attacked: int = Field(gt=1)

    @model_validator(mode="after")
    def _consistent(self) -> DataRule:
        for index, one in enumerate(ROLES):
            for other in ROLES[index + 1 :]:
                if {one, other} == {"train", "auxiliary"}:
                    continue  # the adversary's rule says whether they may
                if getattr(self, one).overlaps(getattr(self, other)):
                    raise ValueError(f"the roles {one!r} and {other!r} share images")
        for role in ROLES:
            named = getattr(self, role).dataset
            if named is not None and _same_place(named, self.dataset):
                raise ValueError(
                    f"the role {role!r} names the protocol's own dataset; leave it out"
                )
            if named is not None and role in ("train", "private"):
                raise ValueError(f"the role {role!r} comes from the protocol's own dataset")
        if self.auxiliary.dataset != self.validation.dataset:
            raise ValueError(
                "the roles 'auxiliary' and 'validation' belong to one attacker: same dataset"
            )
        if self.private.count is not None and self.attacked > self.private.count:
            raise ValueError(f"attacked is {self.attacked}, above the {self.private.count} private")
        return self

    def of(self, dataset: str) -> DataRule:
        """Returns the same roles of another dataset.

        Raises:
            InvalidParamsError: a role comes from that dataset already.
        """
        values = self.model_dump(mode="json") | {"dataset": dataset}
        for role in ROLES:
            values[role]["identity"] = None  # other images are meant now
        return build(DataRule, values, f"data of {dataset}")

    @property
    def strength(self) -> Auxiliary:
        """What the attacker's images have to do with the training images."""
        if self.auxiliary.dataset is not None:
            return "other"
        return "training" if self.auxiliary.overlaps(self.train) else "disjoint"


class BackboneRule(Parameters):
    """The classifier and where it is cut.

    Attributes:
        name: the family.
        params: its parameters.
        split_point: the last stage that the client computes.
    """

    name: str
    params: dict[str, JsonValue] = Field(default_factory=dict)
    split_point: str


class Recipe(Parameters):
    """How a model is trained. Budgets are steps, never seconds: speed must not change results.

    Attributes:
        steps: training steps.
        batch: images per step.
        optimizer: SGD with Nesterov momentum 0.9, or AdamW.
        lr: peak learning rate; linear warm-up, then a cosine to zero.
        weight_decay: on everything with two axes or more.
        warmup: share of the steps in which the rate rises.
        clip: largest norm of the gradient.
        smoothing: label smoothing.
        average: decay of the moving average of the weights that is used in the end.
        flip: mirror half of the images.
        crop: shift by up to so many pixels.
        zoom: cut out a random square of at least this share of the area and enlarge it.
        precision: ``bf16`` is mixed precision on devices that have it, ``fp32`` elsewhere.
    """

    steps: int = Field(gt=0)
    batch: int = Field(default=128, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup: float = Field(default=0.15, ge=0, lt=1)
    clip: float | None = Field(default=None, gt=0)
    smoothing: float = Field(default=0.0, ge=0, lt=1)
    average: float | None = Field(default=None, gt=0, lt=1)
    flip: bool = True
    crop: int = Field(default=4, ge=0)
    zoom: float | None = Field(default=None, gt=0, le=1)
    precision: Literal["fp32", "bf16"] = "bf16"


class JudgeRule(Parameters):
    """The judge that tells what a reconstruction shows; it learns from the auxiliary images.

    Attributes:
        width: channels of its first layer.
        recipe: how it is trained; its seed is the same for all runs.
        degraded: share of its images that are blurred and noisy, as reconstructions are.
        gallery: private images among which an original is sought, the attacked ones included; more
            where more are attacked.
    """

    width: int = Field(default=32, gt=0, le=1024)
    recipe: Recipe
    degraded: float = Field(default=0.25, ge=0, le=1)
    gallery: int = Field(default=1000, gt=1)


class AdversaryRule(Parameters):
    """The adversary: its knowledge, how many servers it reads, and what images it has.

    Every coalition of ``coalition`` servers is screened with a ridge regression on the attacker's
    own images, and the one that leaks most is attacked: the worst share, not a convenient one.

    Attributes:
        knowledge: ``white_box``, ``black_box`` or ``data_only``.
        coalition: number of servers that it reads.
        auxiliary: what its images have to do with the training images: ``training`` (the same
            ones), ``disjoint`` (others of the same kind) or ``other`` (another dataset).
        transmissions: how often it sees each private image sent, with fresh randomness each time.
    """

    knowledge: Knowledge = Knowledge.WHITE_BOX
    coalition: int = Field(default=1, ge=1)
    auxiliary: Auxiliary = "disjoint"
    transmissions: int = Field(default=1, ge=1)


class Protocol(Parameters):
    """One released, immutable protocol.

    Attributes:
        id: name with its version, such as ``cifar10-lite-v1``.
        track: ``lite`` or ``standard``; never ranked: ``smoke``, ``reproduction`` (a published
            setting rebuilt, weaknesses included) and ``test``.
        title: one line for listings.
        data: dataset and roles.
        backbone: classifier and split point.
        recipe: how the model and its defense are trained.
        adversary: who attacks.
        attacks: parameters that the protocol fixes, by attack.
        metrics: names of the scores with their versions, in the order of the tables.
        judge: who tells what a reconstruction shows; null: nobody, and the scores that need a judge
            are null.
        seeds: seeds of a complete result; a single run uses one of them.
        max_client_flops: client budget per image; above it a row is not ranked.
        batch: images per batch when attacking; random draws are made batch by batch.
        threads: CPU threads; another number changes results in the last bits.
        references: by attack, the PSNR in dB that it must reach on the undefended split: what was
            measured when the protocol was made, less 1 dB for other machines. An attack that stays
            below is not calibrated. A changed protocol has none.
        minutes: minutes that parts took on a CPU, for the estimate before a run: ``defense``,
            ``information`` (what the shares tell) and each attack by name, per target; ``<attack>
            once`` for what all its targets share, and ``judge`` for what all runs do.
    """

    id: str
    track: Literal["test", "smoke", "reproduction", "lite", "standard"]
    title: str
    data: DataRule
    backbone: BackboneRule
    recipe: Recipe
    adversary: AdversaryRule = AdversaryRule()
    attacks: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    metrics: dict[str, int] = Field(default_factory=lambda: dict(METRICS), min_length=1)
    judge: JudgeRule | None = None
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    max_client_flops: int | None = Field(default=None, gt=0)
    batch: int = Field(default=128, gt=0)
    threads: int = Field(default=1, gt=0, le=1024)
    references: dict[str, float] = Field(default_factory=dict)
    minutes: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _declared(self) -> Protocol:
        size = self.data.image_size
        if self.recipe.crop >= size:
            raise ValueError(f"recipe.crop is {self.recipe.crop}, but images have {size} pixels")
        if "ssim" in self.metrics and size < SSIM_WINDOW:
            raise ValueError(f"ssim needs images of {SSIM_WINDOW} pixels or more, not {size}")
        if self.judge is not None:
            if size < JUDGED_SIDE:
                raise ValueError(
                    f"a judge needs images of {JUDGED_SIDE} pixels or more, not {size}"
                )
            if self.judge.recipe.crop >= size:
                raise ValueError(
                    f"judge.recipe.crop is {self.judge.recipe.crop}, but images have {size} pixels"
                )
        found = self.data.strength
        if found != self.adversary.auxiliary:
            raise ValueError(
                f"adversary.auxiliary is {self.adversary.auxiliary!r}, but by the roles of 'data' "
                f"the attacker's images are {found!r}"
            )
        return self

    @cached_property
    def content_id(self) -> str:
        """Hash of every value that can change what a run makes.

        Titles and time estimates cannot; references, metrics and the judge rate what is there, see
        `SILENT`.

        Values at their default are left out, so that a field that is added later, with a default
        that keeps its absence's meaning, changes no released id.
        """
        described = self.model_dump(mode="json", exclude=SILENT, exclude_defaults=True)
        return content_id(described)

    @property
    def ranked(self) -> bool:
        """Whether results can stand on a leaderboard: a released protocol of a ranked track."""
        if self.track not in ("lite", "standard") or self.id not in released():
            return False
        return not self.changes

    @property
    def changes(self) -> list[str]:
        """Names what differs from the released protocol of this id; empty if there is none."""
        if self.id not in released():
            return []
        mine, theirs = self.recorded(), load_protocol(self.id).recorded()
        # As JSON: 1 and 1.0 are equal in Python and have different ids.
        return [key for key in mine if canonical_json(mine[key]) != canonical_json(theirs[key])]

    def described(self) -> dict[str, JsonValue]:
        """Returns every value that the content id sees, defaults spelled out."""
        return self.model_dump(mode="json", exclude=SILENT)

    def recorded(self) -> dict[str, JsonValue]:
        """Returns every value that a rerun needs: `described`, the metrics and the judge."""
        return self.model_dump(mode="json", exclude=UNRECORDED)

    def changed(self, values: Mapping[str, Json]) -> Protocol:
        """Returns this protocol with other values, such as those of the command line; never ranked.

        Args:
            values: nested as the fields are; what they leave out stays.

        Raises:
            InvalidParamsError: a key or value is wrong.
        """
        kept = self.model_dump(mode="json", exclude={"references"})
        return build(Protocol, merged(kept, values), self.id)

    def on(self, data: DataRule) -> Protocol:
        """Returns this protocol with other data; it is another protocol and never ranked.

        Raises:
            InvalidParamsError: the data do not fit what the protocol says of the adversary.
        """
        return self.changed({"data": data.model_dump(mode="json")})


def is_folder(dataset: str) -> bool:
    """Says whether a dataset is given as the path of a folder, and not as a name or a class."""
    if ".py:" in dataset:
        return False
    return "/" in dataset or "\\" in dataset or dataset.startswith((".", "~"))


def _same_place(one: str, other: str) -> bool:
    if not (is_folder(one) and is_folder(other)):
        return one == other
    return Path(one).resolve() == Path(other).resolve()


def released() -> list[str]:
    """Returns the ids of the protocols that come with the package, tests-only ones left out."""
    folder = resources.files("mibench") / "protocols"
    names = (Path(file.name) for file in folder.iterdir())
    return sorted(name.stem for name in names if name.suffix == ".yaml")


def load_protocol(name: str) -> Protocol:
    """Reads a released protocol by id, or any protocol from a path that ends in ``.yaml``.

    Raises:
        UnknownNameError: no such id or file.
        InvalidParamsError: the file is not YAML, or a key or value is wrong.
    """
    if name.endswith((".yaml", ".yml")):
        path, where = Path(name), name
        if not path.is_file():
            raise UnknownNameError(f"no protocol file {name}; check the path, or use an id")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidParamsError(f"protocol {name} is not a readable text file") from error
    elif name in released():
        text = (resources.files("mibench") / "protocols" / f"{name}.yaml").read_text("utf-8")
        where = name
    else:
        raise UnknownNameError(unknown("protocol", name, released()))
    values = parse_yaml(text, f"protocol {where}")
    if not isinstance(values, dict):
        raise InvalidParamsError(f"protocol {where} must be a mapping of keys to values")
    return build(Protocol, values, where)
