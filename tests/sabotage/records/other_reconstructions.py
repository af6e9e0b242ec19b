"""Reconstructions are blurred afterwards, so that they look private."""

from forged_runs import cover_up, read
from PIL import Image, ImageFilter

CAUGHT_BY = "record-rescored"
PROTOCOL = "procedural-smoke-v1"


def spoil(folder):
    """Changes the folder of an honest run."""
    for path in (folder / "reconstructions").glob("*.png"):
        Image.open(path).filter(ImageFilter.GaussianBlur(2)).save(path)
    cover_up(folder, read(folder))
