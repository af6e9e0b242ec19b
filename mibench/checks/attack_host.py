"""Requests that an attack answers, in its own process, and what is watched there.

Like everything in that process, what is noted here can be forged by a determined attack; that its
images do not change when originals lie in reach is told by the parent.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from mibench import seeding
from mibench.artifacts import ArtifactStore
from mibench.attacks.base import Attack, Workshop
from mibench.backbones.base import BackboneSpec
from mibench.checks.host import Answer, State, Tensors, handles
from mibench.data import hub, procedural, roles
from mibench.data.roles import Roles
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Shares
from mibench.defenses.none import Undefended
from mibench.errors import ThreatModelError
from mibench.job import with_counts
from mibench.params import build
from mibench.task import Classification, Task
from mibench.threat import Adversary, Knowledge, Target

IMAGES = (".parquet", ".png", ".jpg", ".jpeg", ".arrow", ".npy", ".safetensors")
"""Files that may hold images."""
SOURCES = (
    (roles, "load_roles"),
    (roles, "open_dataset"),
    (roles, "role_images"),
    (roles, "private_images"),
    (procedural, "render"),
    (procedural.Procedural, "load"),
    (hub.HubDataset, "load"),
)
"""What gives images of a dataset."""


class Gate:
    """What the attack may touch now, and what it touched that it may not.

    Attributes:
        busy: whether the attack's own code runs.
        depth: above 0 while the target answers.
        seen: kind and words of everything that was noted, each once.
    """

    def __init__(self) -> None:
        self.busy = False
        self.depth = 0
        self.seen: list[list[str]] = []

    def note(self, kind: str, what: str) -> None:
        """Notes something, if it is the attack that does it."""
        if self.busy and not self.depth and [kind, what] not in self.seen:
            self.seen.append([kind, what])

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """While the attack's code runs."""
        self.busy = True
        try:
            yield
        finally:
            self.busy = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """While the target answers."""
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1


class Bait(ImageSet):
    """Private images in memory; reading them is noted."""

    def __init__(self, pixels: Tensor, labels: Tensor, gate: Gate) -> None:
        super().__init__(pixels, labels)
        self.gate = gate

    def __getattribute__(self, name: str) -> Any:
        if name in ("pixels", "labels", "raw", "images", "chunks", "hashes", "at", "take"):
            object.__getattribute__(self, "__dict__")["gate"].note("bait", name)
        return object.__getattribute__(self, name)


class Watched(Target):
    """The target, which opens the gate for as long as it answers, and counts the queries itself."""

    def __init__(self, defense: Defense, adversary: Adversary, gate: Gate) -> None:
        super().__init__(defense, adversary, "on trial")
        self._gate = gate
        self.counted = 0

    @property
    def task(self) -> Task:
        """See `Target`."""
        with self._gate.opened():
            return super().task

    def share_shapes(self, example: Tensor) -> list[tuple[int, ...]]:
        """See `Target`."""
        with self._gate.opened():
            return super().share_shapes(example)

    def replies(self, shares: Shares) -> tuple[Tensor, ...]:
        """See `Target`."""
        with self._gate.opened():
            return super().replies(shares)

    def query(self, images: Tensor) -> Shares:
        """See `Target`."""
        with self._gate.opened():
            self.counted += len(images)
            return super().query(images)

    def client(self, images: Tensor) -> Shares:
        """See `Target`."""
        with self._gate.opened():
            return super().client(images)

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """See `Target`."""
        with self._gate.opened():
            return super().log_likelihood(shares, predicted)


@handles("attack.watch")
def watch(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Watches the sources of images; before the attack is loaded."""
    gate = state.parts["gate"] = Gate()

    def noting(place: Any, name: str) -> None:
        plain: Callable[..., Any] = getattr(place, name)

        @functools.wraps(plain)
        def called(*arguments: Any, **keywords: Any) -> Any:
            gate.note("dataset", f"{getattr(place, '__name__', place)}.{name}")
            return plain(*arguments, **keywords)

        setattr(place, name, called)

    for place, name in SOURCES:
        noting(place, name)
    own = str(state.folder)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and gate.busy and isinstance(arguments[0], str):
            path = arguments[0]
            if path.endswith(IMAGES) and not path.startswith(own):
                gate.note("file", path)

    sys.addaudithook(hook)
    return {}, {}


@handles("attack.open")
def open_attack(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Makes the attack and its target: the undefended split with the weights that are sent.

    Takes ``most``, which no count that buys strength may exceed, or null; with ``doubled`` these
    are then doubled.

    Answers:
        ``knowledge``, ``budget`` by dotted name, and all ``params``.
    """
    gate: Gate = state.parts["gate"]
    method: type[Attack] = state.parts["class"]
    params = state.parts["params"]
    counts = {key: int(attrgetter(key)(params)) for key in method.budget(params)}
    wanted = dict(counts)
    if header.get("most") is not None:
        wanted = {key: min(value, int(header["most"])) for key, value in wanted.items()}
    if header.get("doubled"):
        wanted = {key: 2 * value for key, value in wanted.items()}
    if wanted != counts:
        values = with_counts(params.model_dump(mode="json"), wanted)
        params = build(method.Params, values, f"attack {method.name}")
    adversary = Adversary(Knowledge(header["knowledge"] or method.knowledge), (0,))
    split = header["split"]
    defense = _guarded(_undefended(split, tensors), gate)
    shop = Workshop(
        tuple(split["image_shape"]),
        header["seed"],
        torch.device("cpu"),
        ArtifactStore(state.folder / "store"),
        1,
    )
    state.parts |= {"defense": defense, "target": Watched(defense, adversary, gate), "bait": None}
    with seeding.stream(header["seed"], "prepare"), gate.at_work():
        state.parts["attack"] = method(params, shop)
    return {"knowledge": str(method.knowledge), "budget": wanted}, {}


@handles("attack.prepare")
def prepare(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Prepares the attack on ``auxiliary`` and ``validation`` images.

    With ``private`` among the tensors, originals lie in memory meanwhile, as they do in a run.
    """
    held = _roles(state, tensors)
    denied = ""
    try:
        _prepared(state, held, header["seed"])
    except ThreatModelError as error:
        denied = str(error)
    # What was bait for the preparation must not be there later, or differences tell less.
    held = None  # type: ignore[assignment]
    tensors.clear()
    gc.collect()
    gate: Gate = state.parts["gate"]
    return {"denied": denied, "seen": list(gate.seen)}, {}


def _prepared(state: State, held: Roles, seed: int) -> None:
    """Has the originals in its frame, like the function that makes a run."""
    attack: Attack = state.parts["attack"]
    gate: Gate = state.parts["gate"]
    with seeding.stream(seed, "prepare"), gate.at_work():
        attack.prepare(state.parts["target"], held.auxiliary, held.validation)


@handles("attack.reconstruct")
def reconstruct(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Rebuilds ``images`` from ``share.0``; with ``private``, originals lie in memory meanwhile.

    Answers:
        ``type`` of what came back; ``denied``, what the target refused; ``seen``.
    """
    attack: Attack = state.parts["attack"]
    gate: Gate = state.parts["gate"]
    held = _roles(state, tensors) if "private" in tensors else None
    shares = (tensors["share.0"].clone(),)
    denied, images = "", None
    try:
        with seeding.stream(header["seed"], "reconstruct", "true", 0), gate.at_work():
            images = attack.reconstruct(shares)
    except ThreatModelError as error:
        denied = str(error)
    del held
    found = {"images": images.detach().cpu()} if isinstance(images, Tensor) else {}
    return {"type": type(images).__name__, "denied": denied, "seen": list(gate.seen)}, found


@handles("attack.target")
def read_target(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Returns the target's weights, and what it counted."""
    defense: Defense = state.parts["defense"]
    target: Watched = state.parts["target"]
    return {
        "training": any(one.training for one in defense.modules()),
        "learns": any(one.requires_grad for one in defense.parameters()),
        "queries": target.queries,
        "counted": target.counted,
    }, dict(defense.state_dict())


# --- helpers -------------------------------------------------------------------------------------


def _undefended(given: Mapping[str, Any], weights: Tensors) -> Defense:
    spec = BackboneSpec(given["backbone"], given["backbone_params"], given["split_point"])
    split = spec.build(tuple(given["image_shape"]), Classification(tuple(given["classes"])), 0)
    defense = Undefended(split, Undefended.Params())
    defense.load_state_dict(weights)
    return defense.eval().requires_grad_(requires_grad=False)


def _guarded(defense: Defense, gate: Gate) -> Defense:
    """Notes whoever reaches for the model past its target."""
    kinds: dict[type[nn.Module], type[nn.Module]] = {}

    def kind_of(plain: type[nn.Module]) -> type[nn.Module]:
        class Guarded(plain):  # type: ignore[valid-type, misc]
            def __getattribute__(self, name: str) -> Any:
                gate.note("model", f"{plain.__name__}.{name}")
                return super().__getattribute__(name)

        return kinds.setdefault(plain, Guarded)

    for module in list(defense.modules()):
        plain = type(module)
        module.__class__ = kinds.get(plain) or kind_of(plain)
    return defense


def _roles(state: State, tensors: Tensors) -> Roles:
    """The images as a run has them; the private ones are empty where none were sent."""

    def of(name: str) -> ImageSet:
        return ImageSet(tensors[f"{name}"], tensors[f"{name}.labels"])

    auxiliary = of("auxiliary") if "auxiliary" in tensors else None
    pixels = tensors.get("private", torch.zeros(0, 3, 1, 1, dtype=torch.uint8))
    labels = torch.zeros(len(pixels), dtype=torch.int64)
    private = Bait(pixels, labels, state.parts["gate"])
    held = auxiliary if auxiliary is not None else private
    validation = of("validation") if "validation" in tensors else private
    task = Classification(("a", "b"))
    return Roles(held, held, validation, private, torch.arange(len(pixels)), task)
