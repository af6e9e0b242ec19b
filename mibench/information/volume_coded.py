"""How much is sent, after a lossless coder has taken out what is redundant."""

from __future__ import annotations

import zlib

import torch

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.information.base import Measure, Reading, View
from mibench.information.quantised import Quantiser
from mibench.metrics.intervals import estimate_mean
from mibench.registry import measures


@measures.register("volume-coded", paper="-")
class CodedVolume(Measure):
    """Bytes of the shares of one image in 8 bits, behind a lossless coder.

    Each share is rounded to 256 steps between the extremes of the auxiliary images' shares, and the
    bytes of one image go through DEFLATE (zlib, level 9, no header), in the order of the tensor.
    The range is fixed beforehand, so the receiver needs no side information. Images are coded one
    by one: what one image has in common with another is not taken out.

    It is an upper bound of what the rounded shares hold, and DEFLATE does not know what neighbours
    in a map have in common, so the true content is less. Noise cannot be compressed and counts in
    full.
    """

    unit = "bytes"

    def measure(self, view: View, checkpoint: Checkpoint) -> Reading:  # noqa: ARG002
        """Codes image by image, all corrupted servers' shares one after the other."""
        quantiser = Quantiser.of(view.auxiliary.shares)
        codes = [code.flatten(1) for code in quantiser.codes(view.validation.shares)]
        sizes = [
            sum(len(_deflated(bytes(row.numpy()))) for row in rows)
            for rows in zip(*codes, strict=True)
        ]
        values = view.validation.values
        seed = seeding.derive(view.seed, "intervals")
        estimate = estimate_mean(torch.tensor(sizes, dtype=torch.float64), seed)
        share = sum(sizes) / len(sizes) / values
        return Reading(
            estimate,
            f"{share:.1%} of {values:,} bytes",
            {
                "values": values,
                "share": share,
                "quantisation_step": list(quantiser.step),
                "clipped": quantiser.clipped(view.validation.shares),
            },
        )


def _deflated(data: bytes) -> bytes:
    coder = zlib.compressobj(level=9, wbits=-15)
    return coder.compress(data) + coder.flush()
