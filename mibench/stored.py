"""Images as they are stored: 8 bits a value, as PNG.

What is stored is what is scored. So a score can be computed again from the files of a run, to the
last digit, and nobody has to ask which of two versions of an image a number belongs to.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_bytes(images: Tensor) -> list[np.ndarray]:
    """Returns images (N, 3, H, W) in [0, 1] as uint8 arrays (H, W, 3), rounded."""
    return list(_scaled(images).permute(0, 2, 3, 1).numpy())


def rounded(images: Tensor) -> Tensor:
    """Returns images (N, 3, H, W) in [0, 1] as they are read back from 8 bits, on the CPU."""
    return _scaled(images).float() / 255


def _scaled(images: Tensor) -> Tensor:
    return (images.detach().cpu().float() * 255).round().clamp(0, 255).to(torch.uint8)
