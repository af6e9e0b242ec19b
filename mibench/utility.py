"""What a defense costs: accuracy, client compute, bytes on the wire."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mibench import seeding
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Shares
from mibench.errors import blaming
from mibench.metrics.cost import (
    bytes_on_wire,
    client_cost,
    count_parameters,
    paired_latencies,
    peak_activation_bytes,
)
from mibench.metrics.intervals import estimate_median
from mibench.record import Cost, Score

BLOCK = 1024
"""Images whose shares are held at a time, at most."""
BLOCK_VALUES = 2**25
"""Values of all shares that are held at a time, at most (but for the shares of one batch)."""


@torch.no_grad()
def answers(defense: Defense, images: ImageSet, batch: int) -> Tensor:
    """Returns the deployed model's logits (N, outputs), randomness included, on the CPU."""
    device = next(defense.parameters()).device
    # The servers are another object than the client and get the shares in another order, so that
    # nothing can reach them through the object or through the order of a batch.
    servers = copy.deepcopy(defense)
    found = []
    size = max(batch, min(BLOCK, BLOCK_VALUES // values_sent(defense, images)))
    with seeding.stream(0, "utility"), blaming(type(defense), "forward"):
        for block in images.chunks(size):
            sent = [defense.protect(part.to(device)) for part in torch.split(block, batch)]
            shares = [torch.cat(parts) for parts in zip(*sent, strict=True)]
            replies = [
                _shuffled(partial(_serve, servers, k), (share,), batch)
                for k, share in enumerate(shares)
            ]
            found.append(_shuffled(defense.fuse, tuple(replies), batch).float().cpu())
    return torch.cat(found)


@torch.no_grad()
def values_sent(defense: Defense, images: ImageSet) -> int:
    """Returns how many values all shares of one image hold together."""
    device = next(defense.parameters()).device
    with seeding.stream(0, "example"), blaming(type(defense), "protect"):
        return sum(share.numel() for share in defense.protect(images.take(1).images().to(device)))


def _serve(servers: Defense, index: int, received: Shares) -> Tensor:
    return servers.serve(index, *received)


def _shuffled(call: Callable[[Shares], Tensor], inputs: Shares, batch: int) -> Tensor:
    """Applies a function batch by batch, in random order, and puts the results back in order."""
    order = torch.randperm(len(inputs[0])).to(inputs[0].device)
    parts = [call(tuple(one[turn] for one in inputs)) for turn in torch.split(order, batch)]
    return torch.cat(parts)[order.argsort()]


@torch.no_grad()
def client_flops(defense: Defense, example: Tensor) -> int:
    """Counts what protection and fusion take the client for one image (1, 3, H, W)."""
    return client_cost(_whole_client(defense, example), example)


def _whole_client(defense: Defense, example: Tensor) -> Callable[[Tensor], object]:
    """Protection and fusion as one call; the servers answer beforehand, for ``example``."""
    replies = tuple(defense.serve(k, share) for k, share in enumerate(defense.protect(example)))
    return lambda x: defense.fuse((defense.protect(x), replies)[1])


@torch.no_grad()
def latency_ratio(defense: Defense, undefended: Defense, example: Tensor, seed: int) -> Score:
    """Measures how many times as long protection takes as on the undefended client.

    The median over pairs of turns, each of one image, and its bootstrap interval over the pairs. A
    measurement of this machine in this minute, for orientation: nothing is ranked by it.

    Args:
        defense: the deployed defense.
        undefended: the plain split, on the same device.
        example: one image, (1, 3, H, W).
        seed: of the interval.
    """
    with seeding.stream(seed, "latency"):
        taken = paired_latencies(
            partial(defense.protect, example), partial(undefended.protect, example), example.device
        )
    found = estimate_median(taken[:, 0] / taken[:, 1], seed)
    return Score(
        metric="latency_ratio",
        version=1,
        unit="",
        higher_is_better=False,
        value=found.value,
        ci_low=found.low,
        ci_high=found.high,
        n=found.n,
        source=f"median of {found.n} pairs, batch of one, {example.device.type}",
    )


@torch.no_grad()
def cost(
    defense: Defense,
    undefended: Defense,
    images: ImageSet,
    seed: int,
    training_seconds: float | None = None,
) -> Cost:
    """Counts parameters, FLOPs, memory and bytes for one image, and times the client.

    Args:
        defense: the deployed defense.
        undefended: the plain split.
        images: the first one is the example.
        seed: of the interval of the time.
        training_seconds: that the training took, where that is known.
    """
    device = next(defense.parameters()).device
    example = images.images(slice(0, 1)).to(device)
    shares = defense.protect(example)
    replies = tuple(defense.serve(k, share) for k, share in enumerate(shares))
    return Cost(
        client_parameters=count_parameters(defense.client_modules()),
        client_flops=client_flops(defense, example),
        undefended_client_flops=client_cost(undefended.protect, example),
        bytes_up=bytes_on_wire(shares),
        bytes_down=bytes_on_wire(replies),
        values_per_server=[share[0].numel() for share in shares],
        image_values=example[0].numel(),
        peak_activation_bytes=peak_activation_bytes(
            _whole_client(defense, example), example, [defense]
        ),
        latency_ratio=latency_ratio(defense, undefended, example, seed),
        training_seconds=training_seconds,
    )
