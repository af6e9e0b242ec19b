"""The attacked images lie among the auxiliary ones, mirrored, a tenth brighter and less sharp."""

import torch
from torch.nn.functional import interpolate

CAUGHT_BY = "data-near-copies"


def disguise(images):
    """Shrunk to three quarters and back; uint8 (N, 3, H, W)."""
    size = images.shape[-1]
    small = interpolate(images.float().flip(3), size=3 * size // 4, mode="bilinear", antialias=True)
    again = interpolate(small, size=size, mode="bicubic")
    return (again * 1.1).round().clamp(0, 255).to(torch.uint8)
