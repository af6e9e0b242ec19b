"""MID as published code applies it to split inference: a stochastic layer on the server."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.backbones.base import Split
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense, Facts
from mibench.defenses.parts.gaussian import kl_to_standard
from mibench.errors import InvalidParamsError
from mibench.registry import defenses
from mibench.training import Losses, Step

SHIFT = 5.0
"""sigma = softplus(s - SHIFT) starts near 0.007."""
SMALLEST = 1e-8
"""Of sigma, so that its logarithm is finite."""


@defenses.register(
    "mid",
    servers="1",
    randomness="none",
    paper="Wang et al., AAAI 2021, arXiv 2009.05241",
)
class MID(Defense):
    """A bottleneck before the classifier, behind the split: the message itself is not protected.

    The server's last linear layer gives way to a stochastic one of half its width and a classifier:

        (mu, s) = W h,  sigma = softplus(s - 5),  v = mu + sigma e,  e ~ N(0, I)
        L = CE(C v) + beta KL(N(mu, sigma^2) || N(0, I)),
        KL = 1/2 sum(mu^2 + sigma^2 - 2 log sigma - 1), averaged over the batch, in nats.

    The paper limits what the *predictions* of a model tell of its training images. Published code
    for split inference took it over with the layer where it was, so that the sampling happens after
    the message has left the client: what a server receives is deterministic, and nothing random
    stands between it and the image. That is what this row shows. The KL reaches the client through
    the server's layers only. For a sample at the split see `mibench.defenses.vib`.

    sigma starts near 0.007, which is hardly random, and has to be trained up; `examine` says where
    it ended. Inferred: v is sampled in training and is mu at inference, so that one message gets
    one answer.
    """

    class Params(Defense.Params):
        """Strength of the bottleneck."""

        beta: float = Field(default=1e-2, gt=0, le=100, description="weight of the KL, per nat")

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        features = self._remove_classifier(split)
        self.bottleneck = nn.Linear(features, 2 * max(1, features // 2))
        self.classifier = nn.Linear(self.bottleneck.out_features // 2, split.classes)

    @torch.no_grad()
    def _remove_classifier(self, split: Split) -> int:
        """Takes the linear layer off that the server ends in; returns how many features it read."""
        linear = [(n, m) for n, m in self.server.named_modules() if isinstance(m, nn.Linear)]
        if linear:
            name, layer = linear[-1]
            said: list[Tensor] = []
            hook = layer.register_forward_hook(lambda *call: said.append(call[2]))
            self.server.eval()
            logits = self.server(torch.zeros(1, *split.feature_shape))
            self.server.train()
            hook.remove()
            if said and said[-1] is logits:
                self.server.set_submodule(name, nn.Identity())
                return layer.in_features
        raise InvalidParamsError(
            "mid replaces the linear layer that a server ends in, and the server of the backbone "
            f"{split.backbone.name} ends otherwise; take another backbone, or vib, which acts at "
            "the split."
        )

    def statistics(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """The share → mu and sigma of the layer before the classifier, each (B, k)."""
        mean, s = self.bottleneck(self.server(share)).float().chunk(2, dim=1)
        return mean, F.softplus(s - SHIFT).clamp_min(SMALLEST)

    def serve(self, index: int, share: Tensor) -> Tensor:  # noqa: ARG002
        """The server, with a sample while training and with mu after it."""
        return self._classify(*self.statistics(share))

    def loss(self, images: Tensor, labels: Tensor, step: Step) -> Losses:  # noqa: ARG002
        """The task's loss on a sample, and beta times the KL in nats."""
        mean, deviation = self.statistics(self.protect(images)[0])
        nats = kl_to_standard(mean, deviation.log()).mean()
        logits = self._classify(mean, deviation)
        return {"task": self.task.loss(logits, labels), "information": self.params.beta * nats}

    def protect(self, images: Tensor) -> tuple[Tensor, ...]:
        """Returns the plain features."""
        return (self.client(images),)

    @torch.no_grad()
    def examine(self, images: ImageSet) -> Facts:
        """Mean sigma of the stochastic layer, which starts near 0.007."""
        device = next(self.parameters()).device
        total = sum(
            self.statistics(self.client(some.to(device)))[1].mean(1).sum().item()
            for some in images.chunks()
        )
        return {"deviation": total / len(images)}

    def _classify(self, mean: Tensor, deviation: Tensor) -> Tensor:
        v = mean + deviation * torch.randn_like(mean) if self.training else mean
        logits: Tensor = self.classifier(v)
        return logits
