"""CIFAR-10."""

from mibench.data.hub import HubDataset
from mibench.registry import datasets
from mibench.task import Classification


@datasets.register("cifar10", paper="Krizhevsky, Learning Multiple Layers of Features, 2009")
class Cifar10(HubDataset):
    """CIFAR-10: 50,000 train and 10,000 test photographs of ten classes, 32x32 pixels."""

    hub_id = "uoft-cs/cifar10"
    image_column = "img"
    label_column = "label"
    native_size = 32
    shown = True
    # fmt: off
    task = Classification((
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    ))
    # fmt: on
