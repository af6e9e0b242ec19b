"""A protocol on which a whole run takes a second or two."""

from mibench.params import build
from mibench.protocol import Protocol


def small_protocol(name, **changes):
    """A protocol of this id; ``private`` counts the private images, other words are fields."""
    private = changes.pop("private", 12)
    values = {
        "id": name,
        "track": "test",
        "title": "as small as it gets",
        "data": {
            "dataset": "procedural",
            "image_size": 32,
            "train": {"split": "stream", "start": 0, "count": 32},
            "auxiliary": {"split": "stream", "start": 1000, "count": 64},
            "validation": {"split": "stream", "start": 2000, "count": 16},
            "private": {"split": "stream", "start": 3000, "count": private},
            "attacked": 12,
        },
        "backbone": {
            "name": "small-resnet", "params": {"stem": 8, "width": 8}, "split_point": "stem"
        },
        "recipe": {"steps": 4, "batch": 16, "precision": "fp32", "crop": 0},
        "metrics": {"mse": 1, "psnr": 1, "ssim": 1},
        "batch": 8,
    }  # fmt: skip
    return build(Protocol, values | changes, name)
