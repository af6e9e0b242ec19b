"""How much is sent at all: the entries that are not zero."""

from __future__ import annotations

import torch

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.information.base import Measure, Reading, View
from mibench.metrics.intervals import estimate_mean
from mibench.registry import measures


@measures.register("volume", paper="Liu et al., arXiv 2501.00824, as its code computes it")
class Volume(Measure):
    """Effective information volume: mean number of entries of the shares that are not zero.

    The published code prints ``count_nonzero / N`` of the features of N images. The paper's own
    definition may be richer; it was not found. Noise has no zeros, so the volume of a noisy message
    is its dimension, however little it tells.
    """

    unit = "values"

    def measure(self, view: View, checkpoint: Checkpoint) -> Reading:  # noqa: ARG002
        """Counts per image, over all corrupted servers."""
        sent = view.validation
        counts = torch.stack([share.flatten(1).count_nonzero(1) for share in sent.shares]).sum(0)
        estimate = estimate_mean(counts.double(), seeding.derive(view.seed, "intervals"))
        share = float(counts.double().mean()) / sent.values
        return Reading(
            estimate,
            f"{share:.1%} of {sent.values:,} values",
            {"values": sent.values, "share": share},
        )
