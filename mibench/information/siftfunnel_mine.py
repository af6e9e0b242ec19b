"""The estimate that the code of SiftFunnel prints as mutual information."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mibench.artifacts import Checkpoint
from mibench.defenses.base import Shares
from mibench.information.base import Measure, Messages, Reading, View, nothing
from mibench.metrics.intervals import Estimate
from mibench.registry import measures

BATCH = 128
EPOCHS = 100
"""Of the published code."""
MEAN = (0.4914, 0.4822, 0.4465)
DEVIATION = (0.2023, 0.1994, 0.2010)
"""By which the published code normalises all colour images."""


@measures.register("siftfunnel-mine", paper="Liu et al., arXiv 2501.00824, as its code computes it")
class SiftFunnelMine(Measure):
    """Donsker-Varadhan with a network in (0, 1): at most 1 nat, and an ordinal score only.

    The shares are padded with zeros at the right and at the bottom to the size of the image and
    stacked behind the normalised image; four 3x3 convolutions to 64, 32, 16 (tanh) and 4 (sigmoid)
    channels; T is the mean of all that comes out. On batches of 128,

        mean T(x, z) - log mean exp T(x, z'),  z' = the shares of the batch in another order,

    is maximised by AdamW (rate 0.01, betas 0.8 and 0.99), and the highest value of any epoch on the
    other images is reported. T lies in (0, 1), so no value can exceed 1 nat, whatever the shares
    tell.

    What is chosen by the value that is then reported is biased upward; that is the published
    estimate, and why it has a name of its own. For a bound use `mine`.

    Departures. The code learns on training images of the target and evaluates on the attacker's;
    here it learns on auxiliary and is evaluated on validation images. It makes 100 epochs; a
    protocol on a CPU makes few, on fewer images, and the record says how many. The code's schedule
    lowers the rate while the value rises, and is left out: it has no say in so few epochs.
    Inferred: padding of 1 in the convolutions, a tanh behind each of the first three, and the mean
    over batches. Shares that are no maps, or larger than the image, cannot be padded to it.
    """

    unit = "nats"

    def measure(self, view: View, checkpoint: Checkpoint) -> Reading:  # noqa: ARG002
        """Learns on auxiliary images, evaluates on validation images behind every epoch."""
        amounts = view.amounts
        learned = view.auxiliary.take(amounts.published)
        read = view.validation.take(amounts.published)
        side = learned.images.shape[2:]
        for share in learned.shares:
            if share.ndim != 4:
                return nothing("defined for shares that are maps, and these are not")
            if share.shape[2] > side[0] or share.shape[3] > side[1]:
                return nothing("defined for shares that are no larger than the image")
        critic = PublishedCritic(sum(share.shape[1] for share in learned.shares)).to(view.device)
        optimiser = torch.optim.AdamW(critic.parameters(), lr=0.01, betas=(0.8, 0.99))
        course = []
        for _ in range(amounts.epochs):
            order = torch.randperm(len(learned))
            for at in torch.split(order, BATCH):
                if len(at) > 1:
                    optimiser.zero_grad(set_to_none=True)
                    loss = -bound(critic, learned.at(at), view.device)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimiser.step()
            course.append(_evaluated(critic, read, view.device))
        best = max(course)
        reason = "the highest of several epochs of one training has no interval"
        return Reading(
            Estimate(best, None, None, len(read), reason),
            f"at most 1 nat by construction; {amounts.epochs} epochs of {len(learned):,} images "
            f"(published: {EPOCHS} epochs)",
            {"per_epoch": course, "epochs": amounts.epochs, "learned_on": len(learned)},
        )


class PublishedCritic(nn.Module):
    """T(x, z) in (0, 1).

    Args:
        channels: of all shares together.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(3 + channels, 64, 3, padding=1)
        self.rest = nn.Sequential(
            nn.Tanh(),
            nn.Conv2d(64, 32, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(32, 16, 3, padding=1),
            nn.Tanh(),
            nn.Conv2d(16, 4, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, images: Tensor, shares: Shares, order: Tensor) -> tuple[Tensor, Tensor]:
        """T (B,) of the pairs, and of the images with the shares in another order.

        The first layer is linear, so its part of the shares is computed once, and not where they
        are padded: that half of the work changes nothing.

        Args:
            images: (B, 3, H, W) in [0, 1].
            shares: maps (B, C, h, w), no larger than the image.
            order: a permutation of the batch.
        """
        shape = (1, 3, 1, 1)
        normalised = (images - images.new_tensor(MEAN).view(shape)) / images.new_tensor(
            DEVIATION
        ).view(shape)
        weight = self.first.weight
        of_image = F.conv2d(normalised, weight[:, :3], self.first.bias, padding=1)
        of_shares, at = torch.zeros_like(of_image), 3
        for share in shares:
            part = F.conv2d(share, weight[:, at : at + share.shape[1]], padding=2)
            # Maps reach one place beyond themselves; what reaches beyond the image is cut.
            part = part[:, :, 1 : 1 + images.shape[2], 1 : 1 + images.shape[3]]
            missing = (0, images.shape[3] - part.shape[3], 0, images.shape[2] - part.shape[2])
            of_shares = of_shares + F.pad(part, missing)
            at += share.shape[1]
        pairs = self.rest(of_image + of_shares).flatten(1).mean(1)
        strangers = self.rest(of_image + of_shares[order]).flatten(1).mean(1)
        return pairs, strangers


def bound(critic: PublishedCritic, messages: Messages, device: torch.device) -> Tensor:
    """The value of one batch in nats, scalar; the order is drawn from the global stream."""
    shares = tuple(share.to(device) for share in messages.shares)
    order = torch.randperm(len(messages)).to(device)
    pairs, strangers = critic(messages.images.to(device), shares, order)
    value: Tensor = pairs.mean() - strangers.logsumexp(0) + math.log(len(strangers))
    return value


@torch.no_grad()
def _evaluated(critic: PublishedCritic, messages: Messages, device: torch.device) -> float:
    batches = [at for at in torch.split(torch.arange(len(messages)), BATCH) if len(at) > 1]
    values = [float(bound(critic, messages.at(at), device)) for at in batches]
    return sum(values) / len(values)
