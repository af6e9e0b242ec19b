"""Images as they are stored: 8 bits a value, as PNG.

What is stored is what is scored. So a score can be computed again from the files of a run, to the
last digit, and nobody has to ask which of two versions of an image a number belongs to.
"""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_HEAD = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
"""How every PNG begins; after it stand width, height, bits of a value, and the kind of colour."""
_KINDS = {0: "L", 2: "RGB", 3: "P", 4: "LA", 6: "RGBA"}


def to_bytes(images: Tensor) -> list[np.ndarray]:
    """Returns images (N, 3, H, W) in [0, 1] as uint8 arrays (H, W, 3), rounded."""
    return list(_scaled(images).permute(0, 2, 3, 1).numpy())


def rounded(images: Tensor) -> Tensor:
    """Returns images (N, 3, H, W) in [0, 1] as they are read back from 8 bits, on the CPU."""
    return _scaled(images).float() / 255


def to_png(image: Image.Image) -> bytes:
    """Returns an image as the bytes of a PNG."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def from_png(data: bytes, side: int) -> Tensor:
    """Reads a square PNG of 8-bit RGB, as uint8 (3, side, side).

    Raises:
        ValueError: it is no readable PNG, or of another size or kind; says what is wrong.
    """
    head, facts = data[: len(_HEAD)], data[len(_HEAD) : len(_HEAD) + 10]
    if head != _HEAD or len(facts) < 10:
        raise ValueError("is no readable PNG (it does not begin like one)")
    # From the file's own head: Pillow would turn 16 bits into 8 without a word, and a huge image
    # is refused before it is decoded.
    width, height = (int.from_bytes(facts[at : at + 4], "big") for at in (0, 4))
    bits, kind = facts[8], _KINDS.get(facts[9], "?")
    if (width, height, bits, kind) != (side, side, 8, "RGB"):
        depth = "" if bits == 8 else f" of {bits} bits"
        raise ValueError(f"is {width}x{height} {kind}{depth}, not {side}x{side} RGB")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            pixels = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"is no readable PNG ({error})") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _scaled(images: Tensor) -> Tensor:
    return (images.detach().cpu().float() * 255).round().clamp(0, 255).to(torch.uint8)
