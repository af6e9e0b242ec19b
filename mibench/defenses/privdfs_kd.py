"""PrivDFS-KD: a key of the user's own chooses which features each server gets."""

from __future__ import annotations

import math
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.backbones.base import Split
from mibench.defenses.base import TOLERANCE, Facts, Shares
from mibench.defenses.privdfs import PrivDFS
from mibench.errors import InvalidParamsError
from mibench.registry import defenses
from mibench.training import Step


@defenses.register(
    "privdfs-kd",
    servers="K",
    randomness="key of the user",
    paper="PrivDFS v1, arXiv 2508.04346",
)
class PrivDFSKD(PrivDFS):
    """PrivDFS whose partition follows a key, so that what one user leaks says less of another.

    Share k has n slots, and slot i has g candidate units of its own. A key c holds an independent
    uniform choice for every slot, and

        z_k[i] = u[s(k, i, c_ki)],

    with u the units of f(x) and s the candidates: drawn at random, no unit a candidate twice. The
    servers do not know the key. Their first layer has weights per slot, and they are trained over
    fresh keys per image, so that they serve any user.

    From the abstract of v1: user-specific keys diversify the partition policy, so that inversions
    learned from queries on one user do not transfer to another. The scheme is not public; slots,
    candidates and servers that do not know the key are our reading. The linear decoder of the
    leakage term does not know the key either.

    ``key=secret``: each message is from another user, with a key drawn afresh, so the queries of an
    attacker meet other keys than its victim's. Then, r the residual at one slot's map,

        log p(z_k | x) = sum_i log mean_c exp(-|r_kic|^2 / 2 s^2),

    with s as for any message without noise, see `Defense.log_likelihood`. ``key=known``: one user
    whose key the attacker has, and nothing is random. Training is the same.
    """

    class Params(PrivDFS.Params):
        """Those of PrivDFS, as far as keys leave them free, and the keys."""

        masks: Literal["learned", "random", "information"] = Field(
            default="random", description="random only: keys choose among fixed candidates"
        )
        choices: int = Field(default=4, ge=2, description="g, candidate units of a slot")
        key: Literal["secret", "known"] = Field(
            default="secret",
            description="each image from another user, or all from one whose key leaked",
        )

        @model_validator(mode="after")
        def _keyed(self) -> Self:
            if self.unit != "phase" or self.masks != "random":
                raise ValueError(
                    "keys choose among fixed candidates, which are phases: leave unit at phase and "
                    f"masks at random (they are {self.unit} and {self.masks})"
                )
            return self

    params: Params
    assignment: Tensor  # (K, n g) unit indices: the candidates of slot after slot
    key: Tensor  # (1, K, n) choices of the one user whose key is known

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        k, n, g = params.servers, self.kept, params.choices
        if k * n * g > self.units:
            raise InvalidParamsError(
                f"{self.name}: {k} servers with density {params.density} and {g} choices need "
                f"{k * n * g} units, but there are {self.units}; lower density to at most "
                f"{1 / (k * g):.4g}, or choices."
            )
        del self.logits  # no mask is learned
        # First layer of every branch, with a column for each slot.
        self.embed = nn.Parameter(self.embed[..., :n].detach().clone())
        self.assignment = torch.randperm(self.units)[: k * n * g].view(k, n * g)
        self.first_assignment = self.assignment.clone()
        if params.key == "known":
            self.register_buffer("key", self._drawn(1))

    def protect(self, images: Tensor) -> Shares:
        """Returns K shares (B, n, H/p, W/p), each row under the key of its own user."""
        count = len(images)
        keys = self._drawn(count) if self.params.key == "secret" else self.key.expand(count, -1, -1)
        return self._sent(images, keys)

    def predict(self, images: Tensor) -> Shares:
        """Returns all candidates, K times (B, n, g, H/p, W/p); with a known key, what is sent."""
        if self.params.key == "known":
            return self.protect(images)
        shape = (len(images), self.kept, self.params.choices, *self.unit_shape)
        return tuple(units.reshape(shape) for units in super().protect(images))

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """Marginal over the keys: the mean density of each slot's candidates."""
        if self.params.key == "known":
            return super().log_likelihood(shares, predicted)
        total = shares[0].new_zeros(len(shares[0]))
        for share, candidates in zip(shares, predicted, strict=True):
            scale = TOLERANCE * share.flatten(1).square().mean(1).sqrt().clamp_min(1e-6)
            distance = (share[:, :, None] - candidates).flatten(3).square().sum(3)
            log_density = -distance / (2 * scale.square())[:, None, None]
            mean = log_density.logsumexp(2) - math.log(self.params.choices)
            total = total + mean.sum(1)
        return total

    def serve(self, index: int, share: Tensor) -> Tensor:
        """Branch ``index``, the same for all keys: its share → class scores, and embedding."""
        entered = F.conv2d(share, self.embed[index][..., None, None])
        reply: Tensor = self.branches[index](entered)
        return reply

    def describe(self) -> Facts:
        """Also the bits of a key; overlap is that of the servers' candidates."""
        bits = self.assignment.numel() / self.params.choices * math.log2(self.params.choices)
        return {**super().describe(), "key_bits": bits}

    def _exchange(self, images: Tensor, step: Step) -> tuple[Shares, Shares]:  # noqa: ARG002
        """Fresh keys for every image, whoever will use the model."""
        shares = self._sent(images, self._drawn(len(images)))
        return shares, tuple(self.serve(k, share) for k, share in enumerate(shares))

    def _drawn(self, count: int) -> Tensor:
        """Fresh keys (count, K, n)."""
        size, device = (count, self.servers, self.kept), self.assignment.device
        return torch.randint(self.params.choices, size, device=device)

    def _sent(self, images: Tensor, keys: Tensor) -> Shares:
        units = self._cut(images)
        candidates = self.assignment.view(self.servers, self.kept, self.params.choices)
        chosen = candidates.expand(len(keys), -1, -1, -1).gather(3, keys[..., None]).squeeze(3)
        rows = torch.arange(len(units), device=units.device)[:, None]
        return tuple(units[rows, places] for places in chosen.unbind(1))
