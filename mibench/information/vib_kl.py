"""The upper bound that a variational bottleneck is trained with."""

from __future__ import annotations

import torch

from mibench import seeding
from mibench.artifacts import Checkpoint
from mibench.defenses.parts.gaussian import kl_to_standard
from mibench.information.base import Measure, Reading, View, nothing
from mibench.information.law import gaussian_law
from mibench.metrics.intervals import estimate_mean
from mibench.registry import measures


@measures.register("vib-kl", paper="Alemi et al., ICLR 2017, arXiv 1612.00410")
class VibKl(Measure):
    """Mean KL(N(mu(x), sigma(x)^2) || N(0, I)) of one message: an upper bound of I(x; z).

    1/2 sum(mu^2 + sigma^2 - 2 log sigma - 1), summed over the values of the corrupted servers'
    shares, in nats. It holds for a client that sends a sample and states mean and deviation for
    each image; for others it is empty. A message far from N(0, I) has a large KL and may tell
    little: `conditional-entropy-bound` measures from a Gaussian that was fitted to the messages.
    """

    unit = "nats"

    @torch.no_grad()
    def measure(self, view: View, checkpoint: Checkpoint) -> Reading:  # noqa: ARG002
        """In closed form, on validation images."""
        law = gaussian_law(view)
        if isinstance(law, str):
            return nothing(law)
        if law.deviation is not None:
            return nothing(
                "the deviation of the noise is the same for all images; see "
                "conditional-entropy-bound"
            )
        nats = kl_to_standard(*law.of(view.validation.images))
        estimate = estimate_mean(nats, seeding.derive(view.seed, "intervals"))
        return Reading(estimate, "upper bound of one message")
