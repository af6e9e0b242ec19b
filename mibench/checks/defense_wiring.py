"""Checks of a defense's wiring: what crosses, who sees it, and whether it has to do with images."""

from __future__ import annotations

import torch
from torch import Tensor

from mibench.checks.battery import Battery, Outcome, failed, passed, warned
from mibench.checks.process import ComponentError, Process
from mibench.checks.trial import Trial
from mibench.data.procedural import CLASS_NAMES
from mibench.defenses.base import TOLERANCE
from mibench.deployment import CONSTANT
from mibench.metrics.cost import bytes_on_wire

SAME = 1e-3
"""Deviation, in units of the RMS, up to which two values are the same but for rounding."""
FEW = 0.01
"""Share of values that may deviate by more: a choice between near ties can fall either way."""
NARROW = ("float32", "float16", "bfloat16", "int32", "int16", "int8", "uint8", "bool")
"""Types of at most 4 bytes."""
LARGER = 2.0
"""Bytes of a message over those of the undefended one above which it is refused."""
NUMERIC = 1e-4
"""Singular value over the largest one above which it counts for the rank."""
OVER_BUDGET = 6.0
"""FLOPs of the client over those of the undefended one that released protocols still rank."""
PRECISE = 0.5
"""Correlation of logits, over images, that rounded shares leave at least."""
NOTHING_LEFT = 0.1
"""Share of the undefended servers' FLOPs below which the servers do nothing any more."""

wiring: Battery[Trial] = Battery()


def deviating(one: Tensor, other: Tensor) -> float:
    """Returns the share of values that differ by more than rounding; 1 for other shapes."""
    if one.shape != other.shape:
        return 1.0
    scale = one.double().square().mean().sqrt().clamp_min(1e-12)
    apart = (one.double() - other.double()).abs()
    return float((~(apart <= SAME * scale)).double().mean())


def most_deviating(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> float:
    """Returns `deviating` of the worst pair of shares."""
    if len(one) != len(other):
        return 1.0
    return max(map(deviating, one, other))


@wiring.check(
    "wire-shares",
    tried="looked at what protect() returns",
    advice="return a tuple of plain tensors, one per declared server, and hang nothing on them",
)
def wire_shares(trial: Trial) -> Outcome:
    """A tuple of plain dense tensors, as many as servers, batch axis first, and nothing else."""
    told, found = trial.client.ask("defense.protect", {"images": trial.some})
    wire, servers = told["wire"], trial.facts["servers"]
    if wire["type"] != "tuple":
        return failed(f"it is a {wire['type']}, not a tuple")
    kinds = [one["type"] for one in wire["elements"]]
    if len(kinds) != servers or set(kinds) != {"Tensor"}:
        return failed(f"{servers} servers are declared, and it holds {', '.join(kinds)}")
    extra = sorted({name for one in wire["elements"] for name in one["attributes"]})
    if extra:
        return failed(f"a share carries further attributes: {', '.join(extra)}")
    shares = [found[f"share.{k}"] for k in range(servers)]
    if any(one.ndim < 2 or len(one) != len(trial.some) for one in shares):
        shapes = ", ".join(str(tuple(one.shape)) for one in shares)
        return failed(f"for {len(trial.some)} images the shapes are {shapes}")
    if not all(bool(one.isfinite().all()) for one in shares if one.is_floating_point()):
        return failed("some values are infinite or not a number")
    sizes = ", ".join("x".join(map(str, one.shape[1:])) for one in shares)
    return passed(f"{servers} plain tensors per image: {sizes}")


@wiring.check(
    "wire-bytes",
    tried="counted the bytes of every share as it crossed, in batches of 1 and of many",
    advice="send values of at most 4 bytes, and no more of them than the undefended split",
)
def wire_bytes(trial: Trial) -> Outcome:
    """At most 4 bytes a value; the same for any batch; not far above the undefended message."""
    together, alone = trial.send(trial.some), trial.send(trial.some[:1])
    kinds = {str(one.dtype).removeprefix("torch.") for one in together}
    if not kinds <= set(NARROW):
        return failed(f"values are {', '.join(sorted(kinds - set(NARROW)))}, of more than 4 bytes")
    each, single = bytes_on_wire(together), bytes_on_wire(alone)
    if each != single:
        return failed(f"{single} bytes for an image alone, {each} each for {len(trial.some)}")
    plain = 4 * torch.Size(trial.facts["feature_shape"]).numel()
    words = f"{each} bytes per image, {each / plain:.2f} times the undefended {plain}"
    if each > LARGER * plain:
        return failed(words)
    return warned(words) if each > plain else passed(words)


@wiring.check(
    "wire-logits",
    tried="ran client, every server and fusion in processes of their own, with only shares and "
    "replies between",
    advice="let serve() use its share and fuse() the replies, with their weights and nothing else",
)
def wire_logits(trial: Trial) -> Outcome:
    """The same logits across processes as in one."""
    stream: tuple[int, str] = (trial.seed, "wire")
    images = trial.some
    _, whole = trial.trainer.ask("defense.answer", {"images": images}, ambient=stream)
    shares = trial.send(images, *stream)
    try:
        apart = trial.logits(shares)
    except ComponentError as error:
        if error.finding.check != "raises":
            raise
        return failed(f"a server cannot answer from its share alone: {error.finding.found}")
    share = deviating(whole["logits"], apart)
    words = f"{share:.1%} of the logits differ from those in one process"
    return failed(words) if share > FEW else passed(words)


@wiring.check(
    "wire-servers",
    tried="asked each server again after others got other shares, and in another order",
    advice="keep no state between calls of serve(), on the object or in the module",
)
def wire_servers(trial: Trial) -> Outcome:
    """A reply depends on the server's own share alone, also where all servers share a process."""
    mine = trial.send(trial.some, trial.seed, "mine")
    other = trial.send(trial.many[-len(trial.some) :], trial.seed, "other")
    fresh = trial.replies(mine)
    house = trial.stand_in("all-servers")
    count = len(mine)

    def serve(k: int, shares: tuple[Tensor, ...]) -> Tensor:
        return house.ask("defense.serve", {"share": shares[k]}, index=k)[1]["reply"]

    for title, order, before in (
        ("after the others got the same images", range(count), mine),
        ("after the others got other images", range(count), other),
        ("in another order", range(count)[::-1], other),
    ):
        for k in order:
            for rest in order:
                if rest != k or count == 1:
                    serve(rest, before)
            share = deviating(fresh[k], serve(k, mine))
            if share > FEW:
                return failed(f"server {k} replies otherwise {title} ({share:.0%} of the values)")
    return passed(f"{count} servers, each with the same reply whatever the others got")


@wiring.check(
    "input-matters",
    tried="compared messages of different images, and permuted the shares over the batch",
    advice="compute every share from the image, and the answer from the shares",
)
def input_matters(trial: Trial) -> Outcome:
    """Distinct images give distinct shares; answers follow the shares and nothing else."""
    images = trial.some
    for k, share in enumerate(trial.predict(images) if trial.random else trial.send(images)):
        flat = share.flatten(1).double()
        scale = flat.square().mean().sqrt().clamp_min(1e-12)
        apart = (flat - flat[:1]).abs().max() / scale
        if not apart > CONSTANT:
            return failed(f"server {k} gets the same message for every image")
    wire: tuple[int, str] = (trial.seed, "permuted")
    own = trial.trainer.ask("defense.answer", {"images": images}, ambient=wire)[1]["logits"]
    moved = trial.trainer.ask("defense.answer", {"images": images}, ambient=wire, shift=1)[1]
    there = trial.logits(tuple(share.roll(1, 0) for share in trial.send(images, *wire)))
    found = {
        "in one process": _correlation(own, moved["logits"]),
        "across processes": _correlation(own, there),
    }
    if bool((own - own.mean(0)).abs().max() <= CONSTANT * own.abs().max()):
        return failed("the logits are the same for all images")
    for where, correlation in found.items():
        if correlation > 0.5:
            return failed(
                f"with the shares of other images the logits stay ({where}, correlation "
                f"{correlation:.2f}): they come from elsewhere"
            )
    words = ", ".join(f"{value:.2f} {where}" for where, value in found.items())
    return passed(f"with permuted shares the logits' correlation with their own is {words}")


def _correlation(one: Tensor, other: Tensor) -> float:
    a, b = (x.double() - x.double().mean(0) for x in (one, other))
    return float((a * b).sum() / (a.norm() * b.norm()).clamp_min(1e-30))


@wiring.check(
    "wire-precision",
    tried=f"rounded every share to {TOLERANCE:.0%} of its RMS and asked the servers again",
    advice="put what the servers need into digits that an attacker looks at",
)
def wire_precision(trial: Trial) -> Outcome:
    """What the servers need does not hide in digits below what attacks allow for.

    Of several servers it is a warning: shares that cancel each other need their digits.
    """
    shares = trial.send(trial.some, trial.seed, "precision")
    own, coarse = trial.logits(shares), trial.logits(tuple(map(_coarse, shares)))
    correlation = _correlation(own, coarse)
    words = f"the logits' correlation with those of rounded shares is {correlation:.2f}"
    if correlation >= PRECISE:
        return passed(words)
    return failed(words) if len(shares) == 1 else warned(words)


def _coarse(share: Tensor) -> Tensor:
    """Rounded to multiples of `TOLERANCE` times each row's RMS; what are no floats stays."""
    if not share.is_floating_point():
        return share
    values = share.double()
    step = TOLERANCE * values.flatten(1).square().mean(1).sqrt().clamp_min(1e-12)
    step = step.view(-1, *(1,) * (share.ndim - 1))
    return ((values / step).round() * step).to(share.dtype)


@wiring.check(
    "label-only",
    tried="counted how many different messages the client sends for many images",
    advice="send features; a client that sends its own decision has computed the model alone",
)
def label_only(trial: Trial) -> Outcome:
    """As many different messages as classes, or fewer, are labels."""
    messages = trial.messages
    scale = (messages - messages.mean(0)).norm(dim=1).mean().clamp_min(1e-12)
    rounded = (messages / (1e-3 * scale)).round()
    different, classes = len(torch.unique(rounded, dim=0)), len(CLASS_NAMES)
    words = f"{different} different messages for {len(messages)} images, {classes} classes"
    return failed(words) if different <= classes else passed(words)


@wiring.check(
    "sends-logits",
    tried="counted the values of a message and the dimensions in which messages differ",
    advice="send features; logits, also spread over a large share, are the finished answer",
)
def sends_logits(trial: Trial) -> Outcome:
    """No more values, or dimensions over images, than logits."""
    messages, classes = trial.messages.double(), len(CLASS_NAMES)
    values = torch.linalg.svdvals(messages - messages.mean(0))
    rank = int((values > NUMERIC * values.max().clamp_min(1e-30)).sum())
    words = f"{messages.shape[1]} values in {rank} dimensions; the task has {classes} logits"
    return failed(words) if min(messages.shape[1], rank) <= classes else passed(words)


@wiring.check(
    "all-on-client",
    tried="counted the FLOPs of client and servers, and those of the undefended split",
    advice="leave work to the servers; a client that runs the whole model needs no servers",
)
def all_on_client(trial: Trial) -> Outcome:
    """Servers that do next to nothing, or a client far over the budget of released protocols."""
    client, servers = _flops(trial.client, trial.some)
    plain, rest = trial.undefended_flops
    words = (
        f"client {client / 1e6:.2f} MFLOPs ({client / plain:.1f} times the undefended), servers "
        f"{servers / 1e6:.2f} MFLOPs ({servers / max(rest, 1):.2f} times)"
    )
    if servers < NOTHING_LEFT * rest and client > plain + rest / 2:
        return failed(f"everything is on the client: {words}")
    if client > OVER_BUDGET * plain:
        return warned(f"over budget, so not ranked: {words}")
    return passed(words)


def _flops(process: Process, images: Tensor) -> tuple[int, int]:
    told, _ = process.ask("defense.cost", {"images": images[:1]})
    return int(told["client_flops"]), int(told["server_flops"])
