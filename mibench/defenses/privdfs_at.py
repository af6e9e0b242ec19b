"""PrivDFS-AT: shares that a proxy attacker beside the training cannot rebuild the image from."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mibench.backbones.base import Split
from mibench.backbones.tokens import on_grid
from mibench.defenses.base import Shares
from mibench.defenses.parts.proxy import ProxyDecoder, push, reversed_gradient, unexplained
from mibench.defenses.privdfs import PrivDFS
from mibench.registry import defenses
from mibench.training import Losses


@defenses.register(
    "privdfs-at", servers="K", randomness="none", paper="PrivDFS v1, arXiv 2508.04346"
)
class PrivDFSAT(PrivDFS):
    """PrivDFS with a proxy reconstructor R_k per share, which the client learns to mislead.

        min over R_k, max over the client:  E_k = E |R_k(z_k) - x|^2 / Var(x),

    each proxy for its own share z_k = m_k * f(x), the client for the worst share only: the one
    that its proxy rebuilds best in this batch, with weight a. One optimiser plays both sides, see
    `reversed_gradient`. An image that is rebuilt far worse than the mean image pulls at the client
    no more, see `push`.

    From the abstract of v1: adversarial training with a proxy attacker, so that the partition
    resists inversion. Its proxy is a diffusion model; here it is a small inverse network, since a
    diffusion model per share and step is out of reach of the smaller protocols. Inferred: all else,
    also that the worst share counts (of a mean over shares, one can escape). The closed-form
    leakage term is off by default.

    The proxies see the kept units in index order and go on through the freeze of the masks; when a
    mask moves, a proxy's input changes under it. Of shares of tokens they see the map with zeros in
    the places that are not sent. Masks get this gradient straight through as well, but a proxy
    normalises its input channel by channel, so masks of phases feel nothing of it and only the stem
    learns to mislead; masks of tokens do feel it.
    """

    class Params(PrivDFS.Params):
        """Those of PrivDFS, and the weight of the adversary."""

        leakage: float = Field(default=0.0, ge=0, description="l, weight of the leakage term")
        adversary: float = Field(
            default=1.0, gt=0, description="a, weight of the proxies' error on the client's side"
        )

        @model_validator(mode="after")
        def _learning(self) -> Self:
            if self.masks == "information":
                raise ValueError(
                    "masks=information freezes the client before it sends shares, so it could not "
                    "learn against the proxies; take masks=learned or masks=random"
                )
            return self

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        whole = params.unit == "token"
        shape = (*self.unit_shape, *self.grid) if whole else (self.kept, *self.unit_shape)
        self.proxies = nn.ModuleList(
            ProxyDecoder(shape, split.image_shape) for _ in range(params.servers)
        )

    def _terms(self, shares: Shares, replies: Shares, images: Tensor, labels: Tensor) -> Losses:
        terms = super()._terms(shares, replies, images, labels)
        weights = torch.zeros(len(shares), len(images), device=images.device)
        errors = torch.stack(
            [
                unexplained(proxy(self._laid_out(k, reversed_gradient(share, weight))), images)
                for k, (proxy, share, weight) in enumerate(
                    zip(self.proxies, shares, weights, strict=True)
                )
            ]
        )
        means = errors.mean(1)
        worst = means.argmin()
        # The reversal reads its weights when the gradient comes back through it.
        weights[worst] = self.params.adversary * push(errors[worst], images)
        return {**terms, "adversary": means.sum()}

    def _laid_out(self, index: int, share: Tensor) -> Tensor:
        """Maps for the proxy: the share itself, or tokens in their places among zeros."""
        if self.params.unit != "token":
            return share
        empty = share.new_zeros(len(share), self.units, share.shape[2])
        return on_grid(empty.index_copy(1, self.assignment[index], share), *self.grid)
