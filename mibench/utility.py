"""What a defense costs: accuracy, client compute, bytes on the wire."""

from __future__ import annotations

import torch
from torch import Tensor

from mibench import seeding
from mibench.data.base import ImageSet
from mibench.defenses.base import Defense
from mibench.metrics.cost import bytes_on_wire, client_cost, count_parameters
from mibench.record import Cost


@torch.no_grad()
def correct(defense: Defense, images: ImageSet, batch: int) -> Tensor:
    """Returns 1 for each image that is classified correctly, randomness included, else 0 (N,)."""
    device = next(defense.parameters()).device
    hits = []
    with seeding.stream(0, "utility"):
        for start in range(0, len(images), batch):
            part = slice(start, start + batch)
            logits = defense(images.images(part).to(device))
            hits.append(logits.argmax(1).cpu() == images.labels[part])
    return torch.cat(hits).float()


@torch.no_grad()
def cost(defense: Defense, undefended: Defense, images: ImageSet) -> Cost:
    """Counts parameters, FLOPs and bytes for one image."""
    device = next(defense.parameters()).device
    example = images.images(slice(0, 1)).to(device)
    shares = defense.protect(example)
    replies = tuple(defense.serve(k, share) for k, share in enumerate(shares))
    return Cost(
        client_parameters=count_parameters(defense.client_modules()),
        client_flops=client_cost(lambda x: defense.fuse((defense.protect(x), replies)[1]), example),
        undefended_client_flops=client_cost(undefended.protect, example),
        bytes_up=bytes_on_wire(shares),
        bytes_down=bytes_on_wire(replies),
        values_per_server=[share[0].numel() for share in shares],
        image_values=example[0].numel(),
    )
