"""CIFAR-100."""

from mibench.data.hub import HubDataset
from mibench.registry import datasets
from mibench.task import Classification


@datasets.register("cifar100", paper="Krizhevsky, Learning Multiple Layers of Features, 2009")
class Cifar100(HubDataset):
    """CIFAR-100: 50,000 train and 10,000 test photographs of 100 classes, 32x32 pixels.

    The names are spelled as on the hub, its slip ``cra`` for "crab" included. Ten official test
    images are also official training images.
    """

    hub_id = "uoft-cs/cifar100"
    image_column = "img"
    label_column = "fine_label"
    native_size = 32
    shown = True
    # fmt: off
    task = Classification((
        "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle",
        "bicycle", "bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can",
        "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock", "cloud",
        "cockroach", "couch", "cra", "crocodile", "cup", "dinosaur", "dolphin", "elephant",
        "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard",
        "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree",
        "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange", "orchid",
        "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate",
        "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket",
        "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake",
        "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
        "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle",
        "wardrobe", "whale", "willow_tree", "wolf", "woman", "worm",
    ))
    # fmt: on
