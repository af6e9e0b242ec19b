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
from mibench.metrics.cost import bytes_on_wire, client_cost, count_parameters
from mibench.record import Cost

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
    replies = tuple(defense.serve(k, share) for k, share in enumerate(defense.protect(example)))
    return client_cost(lambda x: defense.fuse((defense.protect(x), replies)[1]), example)


@torch.no_grad()
def cost(defense: Defense, undefended: Defense, images: ImageSet) -> Cost:
    """Counts parameters, FLOPs and bytes for one image."""
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
    )
