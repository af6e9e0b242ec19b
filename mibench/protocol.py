"""Protocols: everything that must be equal for two results to be comparable.

A protocol is a YAML file read into a frozen model. An unknown key is an error that names the
nearest key, and the content id hashes every value that can change a result.
"""

from __future__ import annotations

from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

from pydantic import Field, JsonValue, model_validator

from mibench.errors import InvalidParamsError, UnknownNameError
from mibench.files import content_id
from mibench.params import Parameters, build, parse_yaml
from mibench.suggest import unknown
from mibench.threat import Knowledge

Roles = Literal["train", "auxiliary", "validation", "private"]


class RoleRule(Parameters):
    """Which images play a role: a range of one split, in the source's own order."""

    split: str
    start: int = Field(default=0, ge=0)
    count: int = Field(gt=0)

    def overlaps(self, other: RoleRule) -> bool:
        """Says whether both ranges hold a common image."""
        return (
            self.split == other.split
            and self.start < other.start + other.count
            and other.start < self.start + self.count
        )


class DataRule(Parameters):
    """The dataset and its four disjoint roles; the first ``attacked`` private ones are attacked."""

    dataset: str
    image_size: int = Field(gt=0)
    train: RoleRule
    auxiliary: RoleRule
    validation: RoleRule
    private: RoleRule
    attacked: int = Field(gt=1)

    @model_validator(mode="after")
    def _disjoint(self) -> DataRule:
        roles: list[Roles] = ["train", "auxiliary", "validation", "private"]
        for index, one in enumerate(roles):
            for other in roles[index + 1 :]:
                if getattr(self, one).overlaps(getattr(self, other)):
                    raise ValueError(f"the roles {one!r} and {other!r} share images")
        if self.attacked > self.private.count:
            raise ValueError(f"attacked is {self.attacked}, above the {self.private.count} private")
        return self


class BackboneRule(Parameters):
    """The classifier and where it is cut."""

    name: str
    params: dict[str, JsonValue] = Field(default_factory=dict)
    split_point: str


class Recipe(Parameters):
    """How a model is trained. Budgets are steps, never seconds: speed must not change results."""

    steps: int = Field(gt=0)
    batch: int = Field(default=128, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=5e-4, ge=0)
    warmup: float = Field(default=0.15, ge=0, lt=1)
    clip: float | None = Field(default=None, gt=0)
    flip: bool = True
    crop: int = Field(default=4, ge=0)
    precision: Literal["fp32", "bf16"] = "bf16"


class AdversaryRule(Parameters):
    """The adversary: its knowledge and how many servers it reads.

    Every coalition of ``coalition`` servers is screened with a ridge regression on the attacker's
    own images, and the one that leaks most is attacked: the worst share, not a convenient one.
    """

    knowledge: Knowledge = Knowledge.WHITE_BOX
    coalition: int = Field(default=1, ge=1)


class Protocol(Parameters):
    """One released, immutable protocol.

    Attributes:
        id: name with its version, such as ``cifar10-lite-v1``.
        track: ``smoke`` (never ranked), ``lite``, ``standard`` or ``test``.
        title: one line for listings.
        data: dataset and roles.
        backbone: classifier and split point.
        recipe: how the model and its defense are trained.
        adversary: who attacks.
        attacks: parameters that the protocol fixes, by attack.
        metrics: names of the scores, in the order of the tables.
        seeds: seeds of a complete result; a single run uses one of them.
        max_client_flops: client budget per image; above it a row is not ranked.
        batch: images per batch when attacking; random draws are made batch by batch.
        threads: CPU threads; another number changes results in the last bits.
        minutes: minutes that parts took on a CPU, for the estimate before a run: ``defense`` and
            each attack by name, per target; ``<attack> once`` for what all its targets share.
    """

    id: str
    track: Literal["test", "smoke", "lite", "standard"]
    title: str
    data: DataRule
    backbone: BackboneRule
    recipe: Recipe
    adversary: AdversaryRule = AdversaryRule()
    attacks: dict[str, dict[str, JsonValue]] = Field(default_factory=dict)
    metrics: tuple[str, ...] = Field(default=("mse", "psnr", "ssim", "lpips"), min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    max_client_flops: int | None = Field(default=None, gt=0)
    batch: int = Field(default=128, gt=0)
    threads: int = Field(default=1, gt=0)
    minutes: dict[str, float] = Field(default_factory=dict)

    @cached_property
    def content_id(self) -> str:
        """Hash of every value that can change a result (titles and time estimates cannot)."""
        described = self.model_dump(mode="json", exclude={"title", "minutes"})
        return content_id(described)

    @property
    def ranked(self) -> bool:
        """Whether results can stand on a leaderboard: a released protocol of a ranked track."""
        if self.track not in ("lite", "standard") or self.id not in released():
            return False
        return self.content_id == load_protocol(self.id).content_id


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
