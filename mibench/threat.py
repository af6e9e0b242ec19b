"""The threat model: what an adversary knows, which servers it reads, what it is handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from mibench.errors import ThreatModelError

if TYPE_CHECKING:
    from torch import Tensor

    from mibench.defenses.base import Defense, Shares
    from mibench.task import Task


class Knowledge(StrEnum):
    """What the adversary knows of the client, weakest first.

    ``data_only``: observed shares, auxiliary images, and the corrupted servers themselves, with
    the task that they were trained for. ``black_box``: it can also send images through the client
    and see the shares. ``white_box``: it also has the client's weights and the defense's law, so
    that it can differentiate through the client.
    """

    DATA_ONLY = "data_only"
    BLACK_BOX = "black_box"
    WHITE_BOX = "white_box"

    def grants(self, needed: Knowledge) -> bool:
        """Says whether an adversary with this knowledge may run an attack that needs ``needed``."""
        order = list(Knowledge)
        return order.index(self) >= order.index(needed)


@dataclass(frozen=True)
class Adversary:
    """Who attacks.

    Attributes:
        knowledge: what it knows of the client.
        corrupted: indices of the servers that it reads, ascending.
        transmissions: how often it sees each private image sent.
    """

    knowledge: Knowledge
    corrupted: tuple[int, ...]
    transmissions: int = 1

    def reads(self, shares: Shares) -> Shares:
        """Returns, of all servers' shares, those of the corrupted servers."""
        return tuple(shares[index] for index in self.corrupted)

    def observes(self, send: Callable[[int], Shares]) -> Shares:
        """Returns what it reads of all transmissions, one after the other.

        Args:
            send: number of a transmission → all servers' shares.
        """
        return tuple(part for turn in range(self.transmissions) for part in self.reads(send(turn)))


class Target:
    """The only thing an attack is handed: a deployed client, seen through the threat model.

    No private image, label or metric can be reached from it. Shares always mean the tensors that
    the corrupted servers receive, in the order of `Adversary.corrupted`, and all that again for
    each further transmission of the same images.
    """

    def __init__(self, defense: Defense, adversary: Adversary, identity: str) -> None:
        """Wraps a trained defense.

        Args:
            defense: the deployed model, in evaluation mode.
            adversary: who attacks.
            identity: content id of the trained defense; names what is trained against it.
        """
        self.__defense = defense
        self.adversary = adversary
        self.identity = f"{identity}/{'+'.join(map(str, adversary.corrupted))}"
        if adversary.transmissions > 1:
            self.identity += f"x{adversary.transmissions}"
        self.queries = 0

    @property
    def task(self) -> Task:
        """What the servers were trained to tell; they know it, whatever else they know."""
        return self.__defense.task

    def share_shapes(self, example: Tensor) -> list[tuple[int, ...]]:
        """Returns the shapes, without the batch axis, of the shares of images like ``example``.

        A server sees them with the first message that it receives, so this is no query.

        Args:
            example: (B, 3, H, W); only its shape, type and device count.
        """
        import torch

        from mibench import seeding

        nothing = torch.zeros_like(example[:1])
        with torch.no_grad(), seeding.stream(0, "shapes"):
            shares = self.adversary.observes(lambda _: self.__defense.protect(nothing))
        return [tuple(share.shape[1:]) for share in shares]

    def replies(self, shares: Shares) -> tuple[Tensor, ...]:
        """Returns what each corrupted server replies to its own share, differentiably.

        The servers belong to the adversary, so this takes no further knowledge and is no query. The
        client's fusion of the replies is out of reach.
        """
        corrupted = self.adversary.corrupted
        return tuple(
            self.__defense.serve(corrupted[at % len(corrupted)], share)
            for at, share in enumerate(shares)
        )

    def query(self, images: Tensor) -> Shares:
        """Sends images (B, 3, H, W) in [0, 1] through the client, fresh randomness each time.

        Returns:
            The corrupted servers' shares. Counts B queries per transmission.

        Raises:
            ThreatModelError: the adversary has observed shares only.
        """
        import torch

        self._need(Knowledge.BLACK_BOX, "queries to the client")
        self.queries += len(images) * self.adversary.transmissions
        with torch.no_grad():
            return mended(self.adversary.observes(lambda _: self.__defense.protect(images)))

    def client(self, images: Tensor) -> Shares:
        """Returns what the client would send without its randomness, differentiably.

        Raises:
            ThreatModelError: the adversary does not know the client's weights.
        """
        self._need(Knowledge.WHITE_BOX, "the client's weights")
        return self.adversary.reads(self.__defense.predict(images)) * self.adversary.transmissions

    def log_likelihood(self, shares: Shares, predicted: Shares) -> Tensor:
        """Returns log p(shares | predicted) under the defense's law, (B,), up to a constant.

        Transmissions are independent, so their logarithms add up.

        Raises:
            ThreatModelError: the adversary does not know the defense's law.
        """
        import torch

        self._need(Knowledge.WHITE_BOX, "the defense's law")
        size = len(self.adversary.corrupted)
        terms = [
            self.__defense.log_likelihood(shares[at : at + size], predicted[at : at + size])
            for at in range(0, len(shares), size)
        ]
        return torch.stack(terms).sum(0)

    def _need(self, knowledge: Knowledge, what: str) -> None:
        if not self.adversary.knowledge.grants(knowledge):
            raise ThreatModelError(
                f"the adversary is {self.adversary.knowledge}, so it has no {what} "
                f"(that takes {knowledge}); choose another attack or another protocol."
            )


def mended(shares: Shares) -> Shares:
    """Reads values that are infinite or not a number as the mean of the finite ones in their place.

    That is what they tell: nothing. A message that a defense breaks now and then is thus attacked
    and scored like any other. The mean goes over the batch; where no value is finite it is 0.
    """
    return tuple(share if share.isfinite().all() else _filled(share) for share in shares)


def mean_transmission(shares: Shares, servers: int) -> Shares:
    """Returns, of several transmissions one after the other, the mean share of each server."""
    import torch

    if len(shares) == servers:
        return shares
    return tuple(torch.stack(shares[server::servers]).mean(0) for server in range(servers))


def broken_messages(shares: Shares) -> int:
    """Counts the images of which some share holds values that are infinite or not a number."""
    whole = [share.flatten(1).isfinite().all(1) for share in shares]
    return sum(not all(parts) for parts in zip(*whole, strict=True))


def _filled(share: Tensor) -> Tensor:
    known = share.isfinite()
    finite = share.where(known, 0)
    mean = finite.sum(0, keepdim=True) / known.sum(0, keepdim=True).clamp_min(1)
    return finite.where(known, mean)
