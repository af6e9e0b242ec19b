"""ImageNet-1K."""

from importlib import resources

from mibench.data.hub import HubDataset
from mibench.registry import datasets
from mibench.task import Classification

_NAMES = resources.files("mibench.data") / "imagenet1k.txt"


@datasets.register("imagenet1k", paper="arXiv:1409.0575")
class ImageNet1k(HubDataset):
    """ImageNet-1K: 1,281,167 train and 50,000 validation photographs of 1,000 classes.

    The hub's splits are ``train``, ``validation`` and ``test``, whose labels are not public. The
    hub gives the images to those who have accepted the terms of access. The names of the classes
    are the hub's.
    """

    hub_id = "ILSVRC/imagenet-1k"
    folder = "imagenet-1k"
    image_column = "image"
    label_column = "label"
    task = Classification(tuple(_NAMES.read_text("utf-8").splitlines()))
