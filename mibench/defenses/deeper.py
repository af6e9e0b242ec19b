"""Control: a plain split further back, where the client works as much as another defense's."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from mibench.backbones.base import Split
from mibench.defenses.base import Defense, Facts, Shares
from mibench.defenses.parts.another import OfAnother, another
from mibench.errors import InvalidParamsError
from mibench.metrics.cost import client_cost
from mibench.registry import defenses
from mibench.utility import client_flops


@defenses.register("deeper", servers="1", randomness="none", paper="-")
class Deeper(Defense):
    """Plain split inference behind a later stage, chosen by what another defense costs the client.

    Features leak less the deeper the split is. A defense that makes the client compute more must
    beat the plain split at which the client computes as much. Of the split points behind the
    protocol's, this takes the one whose client needs nearest to as many FLOPs as the other
    defense's (by their ratio). Stages are whole, so it can be far off: the record has both counts.
    """

    class Params(OfAnother):
        """Whose cost."""

    params: Params

    def __init__(self, split: Split, params: Params) -> None:
        super().__init__(split, params)
        if not split.later_points:
            raise InvalidParamsError(
                f"deeper: there is no split point behind {split.split_point!r}; choose a protocol "
                "with an earlier one."
            )
        # A copy: building the other defense may change the split.
        built = another(Deeper, copy.deepcopy(split), params).eval()
        example = torch.zeros(1, *split.image_shape)
        self.wanted = client_flops(built, example)
        stages, first = [*split.client, *split.server], len(split.client) + 1
        plain = nn.Sequential(*stages).eval()
        found = {
            cut: client_cost(plain[:cut], example)
            for cut in range(first, first + len(split.later_points))
        }
        plain.train()
        nearest = min(found, key=lambda cut: abs(math.log(found[cut] / max(self.wanted, 1))))
        self.split_point, self.flops = split.later_points[nearest - first], found[nearest]
        self.client, self.server = plain[:nearest], plain[nearest:]

    def protect(self, images: Tensor) -> Shares:
        """Returns the features of the later split point."""
        return (self.client(images),)

    def describe(self) -> Facts:
        """The split point, and the FLOPs of both clients."""
        return {
            "split_point": self.split_point,
            "client_flops": self.flops,
            "flops_of_the_other": self.wanted,
        }
