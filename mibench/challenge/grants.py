"""What of a trained defense an adversary has: no weight that `Target` would not let it use.

Which weights the answers of a `Target` follow from is found by trying: a tensor is made unreadable,
and where every answer stays as it was, the adversary has no use for it and does not get it. So the
rule needs to know nothing about a defense, and a network's helpers from training, other servers
and the fusion of the replies stay behind.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mibench import seeding
from mibench.data.sets import ImageSet
from mibench.defenses.base import Defense
from mibench.errors import InvalidParamsError
from mibench.threat import Adversary, Knowledge, Target

TRIED = 4
"""Images that the answers are compared on."""
DRAWS = 4
"""Random streams under which a defense is queried: a client may choose among its weights."""


@dataclass(frozen=True)
class Grants:
    """The weights that an adversary has.

    Attributes:
        tensors: by name, on the CPU; what is blank in them is not granted.
        withheld: names of the others.
        partly: by name, the rows of a granted tensor that are blank: they belong to other servers.
    """

    tensors: dict[str, Tensor]
    withheld: list[str]
    partly: dict[str, list[int]]


def granted(defense: Defense, adversary: Adversary, images: ImageSet) -> Grants:
    """Finds the weights that the answers of a target follow from; leaves the defense as it is.

    Args:
        defense: trained, in evaluation mode.
        adversary: who attacks.
        images: of the attacker; the first few are used.

    Raises:
        InvalidParamsError: the adversary may send images through the client and not see its
            weights. A folder cannot answer queries.
    """
    if adversary.knowledge is Knowledge.BLACK_BOX:
        raise InvalidParamsError(
            "the protocol's adversary is black_box: it may query a client without having its "
            "weights, and a folder cannot answer; attacks on it are run with `mibench run`"
        )
    # A copy, since it is spoilt; on the CPU, since equal must mean equal to the last bit.
    defense = copy.deepcopy(defense).cpu()
    state = defense.state_dict()
    tried = images.take(TRIED).images()
    before = list(_answers(defense, adversary, tried))

    def needed(spoil: Iterable[tuple[Tensor, list[int] | None]]) -> bool:
        pairs = list(spoil)
        kept = [tensor.clone() for tensor, _ in pairs]
        try:
            for tensor, rows in pairs:
                blank(tensor, rows)
            after = _answers(defense, adversary, tried)
            # As they come: most weights show in the first answers already.
            return any(not torch.equal(*two) for two in zip(before, after, strict=True))
        finally:
            for (tensor, _), was in zip(pairs, kept, strict=True):
                tensor.copy_(was)

    with torch.no_grad():
        withheld = [name for name, tensor in state.items() if not needed([(tensor, None)])]
        others = [at for at in range(defense.servers) if at not in adversary.corrupted]
        partly = {
            name: others
            for name, tensor in state.items()
            if name not in withheld
            and others
            and tensor.ndim > 1
            and len(tensor) == defense.servers
            and not needed([(tensor, others)])
        }
        together: list[tuple[Tensor, list[int] | None]] = [(state[one], None) for one in withheld]
        together += [(state[name], rows) for name, rows in partly.items()]
        assert not needed(together), "weights that matter only together are granted one by one"
    tensors = {
        name: tensor.detach().cpu().clone().contiguous()
        for name, tensor in state.items()
        if name not in withheld
    }
    for name, rows in partly.items():
        blank(tensors[name], rows)
    return Grants(tensors, withheld, partly)


def blank(tensor: Tensor, rows: list[int] | None = None) -> None:
    """Makes a tensor, or some of its rows, unreadable in place: NaN, and 0 for whole numbers."""
    value = float("nan") if tensor.is_floating_point() else 0
    if rows is None:
        tensor.fill_(value)
    else:
        tensor[rows] = value


@torch.enable_grad()
def _answers(defense: Defense, adversary: Adversary, images: Tensor) -> Iterator[Tensor]:
    """Everything that a target answers to these images, and the gradients that it lets through."""
    target = Target(defense, adversary, "tried")
    with seeding.stream(0, "grants"), torch.no_grad():
        sent = adversary.observes(lambda _: defense.protect(images))
    # The servers get numbers of our own, so that their replies say nothing about the client.
    with seeding.stream(0, "replies"):
        probes = [
            torch.randn_like(share).requires_grad_()
            if share.is_floating_point()
            else torch.zeros_like(share)
            for share in sent
        ]
    asking = [probe for probe in probes if probe.requires_grad]
    for reply in target.replies(tuple(probes)):
        yield reply.detach()
        yield from _gradients(reply.square(), asking)
    if not adversary.knowledge.grants(Knowledge.WHITE_BOX):
        return
    asked = images.clone().requires_grad_()
    predicted = target.client(asked)
    for share in predicted:
        yield share.detach()
    likely = target.log_likelihood(sent, predicted)
    yield likely.detach()
    yield from _gradients(likely, [asked])
    for draw in range(DRAWS):
        with seeding.stream(draw, "grants"):
            queried = target.query(images)
        yield from queried


def _gradients(values: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    if not values.requires_grad or not inputs:
        return []
    found = torch.autograd.grad(values.sum(), inputs, allow_unused=True)
    return [one for one in found if one is not None]
