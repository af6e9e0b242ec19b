"""A dataset whose auxiliary images hold the private ones, in some disguise."""

import torch

from mibench.data.base import Dataset
from mibench.data.procedural import CLASS_NAMES, render
from mibench.data.sets import ImageSet
from mibench.task import Classification

PRIVATE = 24


class Tampered(Dataset):
    """Generated images; `disguise` makes auxiliary ones of the private ones."""

    task = Classification(tuple(CLASS_NAMES))
    disguise = None

    def size(self, split):
        return 1000

    def load(self, split, start, count):
        first = {"train": 0, "auxiliary": 10**6, "validation": 2 * 10**6, "private": 3 * 10**6}
        pixels, labels = render(torch.arange(first[split], first[split] + count), seed=11)
        if split == "auxiliary" and type(self).disguise is not None:
            private, _ = render(torch.arange(first["private"], first["private"] + PRIVATE), seed=11)
            pixels[:PRIVATE] = type(self).disguise(private)
        return ImageSet(pixels, labels)


def rule():
    """Roles of that dataset."""
    sizes = {"train": 200, "auxiliary": 200, "validation": 50, "private": PRIVATE}
    return {
        "dataset": f"{__name__}:{Tampered.__name__}",
        "image_size": 32,
        "attacked": PRIVATE,
        **{role: {"split": role, "start": 0, "count": count} for role, count in sizes.items()},
    }
