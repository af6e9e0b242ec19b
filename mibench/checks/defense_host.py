"""Requests that a defense answers in its own process; see `mibench.checks.host`.

A share is named ``share.K`` wherever it crosses, images are ``images``, float (B, 3, H, W) in
[0, 1]. ``ambient`` is the random stream that is active during a call, as [seed, name, ...].
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.backbones.base import BackboneSpec
from mibench.checks.host import Answer, State, Tensors, handles
from mibench.checks.shares import named, unnamed
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Shares, divided
from mibench.errors import InvalidParamsError
from mibench.metrics.cost import client_cost, count_parameters
from mibench.protocol import Recipe
from mibench.task import Attributes, Classification
from mibench.training import Step
from mibench.utility import client_flops

MOMENTS = (0.0, 0.5, 0.99)
"""Shares of a phase at which loss terms are looked at."""


@handles("defense.build")
def build(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Builds the loaded class around a fresh backbone, as `mibench.deployment.build_defense` does.

    Takes ``backbone``, ``backbone_params``, ``split_point``, ``image_shape``, ``classes`` and
    ``seed``; with ``attributes``, the classes are attributes. Leaves the defense, in evaluation
    mode, in ``state.parts["defense"]``.

    Answers:
        ``servers``, names of ``phases``, ``feature_shape``, ``misfit`` (why it cannot be built on
        this backbone, or null), and of each parameter whether it ``learns``, belongs to the
        ``client`` and is ``own`` (the defense's, not the backbone's).
    """
    spec = BackboneSpec(header["backbone"], header["backbone_params"], header["split_point"])
    shape, kind = tuple(header["image_shape"]), Attributes if header.get("attributes") else None
    task = (kind or Classification)(tuple(header["classes"]))
    split = spec.build(shape, task, header["seed"])
    inherited = {id(one) for one in split.parameters()}
    method = state.parts["class"]
    try:
        with seeding.stream(header["seed"], "defense"):
            defense: Defense = method(split, state.parts["params"])
    except InvalidParamsError as error:
        return {"misfit": " ".join(str(error).split())}, {}
    state.parts["defense"] = defense.eval()
    on_client = {id(one) for part in defense.client_modules() for one in part.parameters()}
    parameters = [
        {
            "name": name,
            "learns": one.requires_grad,
            "client": id(one) in on_client,
            "own": id(one) not in inherited,
        }
        for name, one in defense.named_parameters()
    ]
    facts: dict[str, Any] = {
        "misfit": None,
        "servers": defense.servers,
        "phases": [phase.name for phase in defense.phases],
        "feature_shape": list(split.feature_shape),
        "parameters": parameters,
        "own_predict": type(defense).predict is not Defense.predict,
        "own_law": type(defense).log_likelihood is not Defense.log_likelihood,
        "own_fit": type(defense).fit is not Defense.fit,
    }
    return facts, {}


@handles("defense.state")
def read_state(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Returns the state dictionary."""
    return {}, dict(_defense(state).state_dict())


@handles("defense.load")
def load_state(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Loads a state dictionary."""
    _defense(state).load_state_dict(tensors)
    return {}, {}


@handles("defense.protect")
def protect(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Sends images through the client.

    Takes ``ambient``, ``grad`` (whether gradients are recorded) and ``training`` (the mode).

    Answers:
        The shares, and under ``wire`` what was returned: its type, and of each element the type,
        dtype, shape and names of further attributes.
    """
    defense, images = _defense(state), tensors["images"]
    with _mode(defense, header), _ambient(header):
        if header.get("grad"):
            sent = defense.protect(images.clone().requires_grad_())
        else:
            with torch.no_grad():
                sent = defense.protect(images)
    elements: Sequence[Any] = sent if isinstance(sent, tuple | list) else [sent]
    wire: dict[str, Any] = {
        "type": type(sent).__name__,
        "elements": [_described(one) for one in elements],
    }
    return {"wire": wire}, named([one for one in elements if isinstance(one, Tensor)])


@handles("defense.predict")
def predict(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Returns the parameters of the message."""
    with torch.no_grad(), _ambient(header):
        return {}, named(_defense(state).predict(tensors["images"]))


@handles("defense.serve")
def serve(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Returns the ``reply`` of server ``index`` to ``share``."""
    with torch.no_grad(), _ambient(header):
        return {}, {"reply": _defense(state).serve(header["index"], tensors["share"])}


@handles("defense.fuse")
def fuse(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Returns the ``logits`` that the client makes of all replies."""
    with torch.no_grad(), _ambient(header):
        return {}, {"logits": _defense(state).fuse(unnamed(tensors, "reply"))}


@handles("defense.answer")
def answer(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Sends images and has all servers and the fusion answer, in this one process.

    With ``shift`` the shares are moved on by so many rows before the servers see them.
    """
    defense = _defense(state)
    with torch.no_grad(), _ambient(header):
        shares = defense.protect(tensors["images"])
        moved = tuple(share.roll(header.get("shift", 0), 0) for share in shares)
        return {}, {"logits": defense.answer(moved)}


@handles("defense.likelihood")
def likelihood(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Returns log p(shares | predict(images)) as ``value`` (B,), and its gradients.

    ``images.grad`` is that in the images, ``share.K.grad`` those in the shares.
    """
    images = tensors["images"].clone().requires_grad_()
    shares = tuple(one.clone().requires_grad_() for one in unnamed(tensors))
    value = _likelihood(_defense(state), shares, images)
    if not value.requires_grad:
        return {"constant": True}, {"value": value}
    found = torch.autograd.grad(value.sum(), (images, *shares), allow_unused=True)
    whole = [
        torch.zeros_like(one) if grad is None else grad
        for one, grad in zip((images, *shares), found, strict=True)
    ]
    slopes = {f"share.{k}.grad": one for k, one in enumerate(whole[1:])}
    return {"constant": False}, {"value": value, "images.grad": whole[0], **slopes}


def _likelihood(defense: Defense, shares: Shares, images: Tensor) -> Tensor:
    return defense.log_likelihood(shares, defense.predict(images))


@handles("defense.slopes")
def slopes(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Returns slopes of c . predict(x) along ``directions`` (D, B, 3, H, W), three times (D, B).

    ``autograd`` by backpropagation, ``near`` and ``far`` by central differences with the steps
    ``near`` and ``far``. c is random and the same for all. In double precision where the defense
    permits it.
    """
    defense: Defense = copy.deepcopy(_defense(state))
    images, directions = tensors["images"].double(), tensors["directions"].double()
    try:
        defense = defense.double()
        defense.predict(images)
        double = True
    except (RuntimeError, TypeError):
        defense, images, directions = _defense(state), images.float(), directions.float()
        double = False
    weights = [
        torch.randn(one.shape, generator=seeding.generator(header["seed"], k)).to(one)
        for k, one in enumerate(defense.predict(images))
    ]

    def value(at: Tensor) -> Tensor:
        pairs = zip(defense.predict(at), weights, strict=True)
        return torch.stack([(a * c).flatten(1).sum(1).double() for a, c in pairs]).sum(0)

    leaf = images.clone().requires_grad_()
    total = value(leaf)
    gradient = torch.zeros_like(images)
    if total.requires_grad:
        (found,) = torch.autograd.grad(total.sum(), leaf, allow_unused=True)
        gradient = gradient if found is None else found
    with torch.no_grad():
        secants = {
            name: torch.stack(
                [(value(images + h * v) - value(images - h * v)) / (2 * h) for v in directions]
            )
            for name, h in (("near", header["near"]), ("far", header["far"]))
        }
    inner = (gradient[None] * directions).flatten(2).sum(2)
    return {"double": double}, {"autograd": inner, **secants}


@handles("defense.fit")
def fit(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Trains the defense with its own `Defense.fit` on uint8 ``pixels`` with ``labels``.

    Answers:
        ``steps`` of optimisers and ``backwards`` passes that were made, and which parameters moved.
    """
    defense = _defense(state)
    recipe = Recipe(**header["recipe"])
    before = {name: one.detach().clone() for name, one in defense.named_parameters()}
    folder = state.folder / f"checkpoint-{len(list(state.folder.iterdir()))}"
    defense.train()
    with _counted() as counts:
        defense.fit(_images(tensors), recipe, header["seed"], Checkpoint(folder))
    defense.eval()
    after = dict(defense.named_parameters())
    still = [name for name, one in before.items() if torch.equal(one, after[name])]
    return {"still": still, "steps": counts["steps"], "backwards": counts["backwards"]}, {}


@handles("defense.terms")
def terms(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Returns the loss terms of a fresh defense, phase by phase, and what their gradients reach.

    Answers:
        ``terms``: for each phase, moment and term its ``value``, the largest gradient in a
        parameter of the client (``client``) and of all (``all``), and whether any parameter of
        the client learns in this phase (``open``).
    """
    defense, train = _defense(state), _images(tensors)
    on_client = {id(one) for part in defense.client_modules() for one in part.parameters()}
    told: list[dict[str, Any]] = []
    defense.train()
    steps = header["steps"]
    for phase, _ in divided(defense.phases, steps, "component"):
        with seeding.stream(header["seed"], "begin"):
            defense.begin(phase.name, train)
        learning = [one for one in defense.parameters() if one.requires_grad]
        for moment in MOMENTS:
            draws = seeding.generator(header["seed"], int(100 * moment))
            step = Step(int(moment * steps), steps, draws, phase.name)
            with seeding.stream(header["seed"], "global", step.index):
                defense.observe(train, step)
                some = slice(0, header["batch"])
                found = defense.loss(train.images(some), train.labels[some], step)
                told += [
                    {
                        "phase": phase.name,
                        "term": name,
                        "value": float(value),
                        "open": any(id(one) in on_client for one in learning),
                        **_reached(value, learning, on_client),
                    }
                    for name, value in found.items()
                ]
    defense.eval()
    return {"terms": told}, {}


def _reached(value: Tensor, learning: list[nn.Parameter], client: set[int]) -> dict[str, float]:
    if not value.requires_grad:
        return {"client": 0.0, "all": 0.0}
    found = torch.autograd.grad(value, learning, retain_graph=True, allow_unused=True)
    sizes = [
        (id(one) in client, 0.0 if grad is None else float(grad.abs().max()))
        for one, grad in zip(learning, found, strict=True)
    ]
    return {
        "client": max((size for mine, size in sizes if mine), default=0.0),
        "all": max((size for _, size in sizes), default=0.0),
    }


@handles("defense.scaled")
def scaled(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:
    """Multiplies all weights of the client that learn by ``factor``, and trains a few steps.

    The recipe's rate is next to nothing: this shows what a client with large features would send,
    once scales were measured anew. Returns ``draws`` messages (R, B, ...) for each server, in
    training mode, and the loss ``terms`` of the last phase.
    """
    defense: Defense = copy.deepcopy(_defense(state))
    kept = state.parts["defense"]
    with torch.no_grad():
        own = {id(one): one for part in defense.client_modules() for one in part.parameters()}
        for one in own.values():
            if one.requires_grad:
                one.mul_(header["factor"])
    state.parts["defense"] = defense
    try:
        fit(state, header, tensors)
        defense.train()
        images, labels = _images(tensors).images(), tensors["labels"]
        last = Step(10**6 - 1, 10**6, seeding.generator(header["seed"], "last"), _last(defense))
        with torch.no_grad(), seeding.stream(header["seed"], "scaled"):
            draws = [defense.protect(images) for _ in range(header["draws"])]
            found = defense.loss(images, labels, last)
    finally:
        state.parts["defense"] = kept
    values = {name: float(value) for name, value in found.items()}
    stacked = [torch.stack(parts) for parts in zip(*draws, strict=True)]
    return {"terms": values}, named(stacked)


def _last(defense: Defense) -> str:
    return defense.phases[-1].name


@handles("defense.cost")
def cost(state: State, header: Mapping[str, Any], tensors: Tensors) -> Answer:  # noqa: ARG001
    """Counts FLOPs of client and servers, and parameters, for one image."""
    defense, example = _defense(state), tensors["images"][:1]
    with torch.no_grad():
        shares = defense.protect(example)
        served = sum(
            client_cost(lambda x, k=k: defense.serve(k, x), share)  # type: ignore[misc]
            for k, share in enumerate(shares)
        )
        client = client_flops(defense, example)
    return {
        "client_flops": client,
        "server_flops": served,
        "client_parameters": count_parameters(defense.client_modules()),
    }, {}


# --- helpers -------------------------------------------------------------------------------------


def _defense(state: State) -> Defense:
    defense: Defense = state.parts["defense"]
    return defense


def _images(tensors: Tensors) -> ImageSet:
    return ImageSet(tensors["pixels"], tensors["labels"])


def _described(one: Any) -> dict[str, Any]:
    if not isinstance(one, Tensor):
        return {"type": type(one).__name__, "attributes": []}
    return {
        "type": type(one).__name__,
        "attributes": sorted(vars(one)),
        "dtype": str(one.dtype).removeprefix("torch."),
        "shape": list(one.shape),
        "layout": str(one.layout).removeprefix("torch."),
    }


@contextmanager
def _ambient(header: Mapping[str, Any]) -> Iterator[None]:
    seed, *names = header.get("ambient") or [0, "check"]
    with seeding.stream(seed, *names):
        yield


@contextmanager
def _mode(defense: Defense, header: Mapping[str, Any]) -> Iterator[None]:
    defense.train(bool(header.get("training")))
    try:
        yield
    finally:
        defense.eval()


@contextmanager
def _counted() -> Iterator[dict[str, int]]:
    """Counts the steps of all optimisers and the backward passes."""
    counts = {"steps": 0, "backwards": 0}
    plain: Callable[..., None] = torch.autograd.backward

    def stepped(*_: Any) -> None:
        counts["steps"] += 1

    def backward(*arguments: Any, **keywords: Any) -> None:
        counts["backwards"] += 1
        plain(*arguments, **keywords)

    hook = register_optimizer_step_pre_hook(stepped)
    torch.autograd.backward = backward
    try:
        yield counts
    finally:
        torch.autograd.backward = plain
        hook.remove()
