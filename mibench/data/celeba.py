"""CelebA."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mibench.data.hub import HubDataset
from mibench.data.images import UnfitImageError
from mibench.registry import datasets
from mibench.task import Attributes


@datasets.register("celeba", paper="arXiv:1411.7766")
class CelebA(HubDataset):
    """CelebA: 202,599 aligned faces with 40 yes-or-no attributes, 178x218 pixels.

    The hub's splits are ``train`` (162,770), ``valid`` (19,867) and ``test`` (19,962); no person
    is in two of them.
    """

    hub_id = "flwrlabs/celeba"
    image_column = "image"
    # fmt: off
    task = Attributes((
        "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald",
        "Bangs", "Big_Lips", "Big_Nose", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair",
        "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses", "Goatee", "Gray_Hair",
        "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache",
        "Narrow_Eyes", "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose",
        "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling", "Straight_Hair",
        "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick",
        "Wearing_Necklace", "Wearing_Necktie", "Young",
    ))
    # fmt: on

    @property
    def columns(self) -> tuple[str, ...]:
        """One column for each attribute."""
        return self.task.names

    @property
    def blank(self) -> Tensor:
        """No attribute holds: uint8 (40,)."""
        return torch.zeros(self.task.outputs, dtype=torch.uint8)

    def label(self, row: Mapping[str, Any]) -> Tensor:
        """Returns the attributes of a face, uint8 (40,); see `HubDataset.label`."""
        for name in self.columns:
            if not isinstance(row[name], bool):
                raise UnfitImageError(f"has {row[name]!r} for {name}, not true or false")
        return torch.tensor([row[name] for name in self.columns], dtype=torch.uint8)
