"""Reconstructions of another size than the protocol's images."""

from forged_runs import cover_up, read
from PIL import Image

CAUGHT_BY = "record-counts"


def spoil(folder):
    """Changes the folder of an honest run."""
    for path in (folder / "reconstructions").glob("*.png"):
        Image.open(path).resize((16, 16)).save(path)
    cover_up(folder, read(folder))
