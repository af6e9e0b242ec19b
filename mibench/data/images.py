"""From an encoded image, as a camera or the web gives it, to a square of bytes."""

from __future__ import annotations

import contextlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from mibench.errors import DataError

# Formats that are decoded inside Pillow: some others (EPS) start programs.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
MOST_PIXELS = 89_000_000
"""A larger image may be a decompression bomb: small on disk, many gigabytes in memory."""
_FRAMED = ("GIF", "PNG", "TIFF", "WEBP")  # a JPEG's further images are parts of the first
_WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N")

# Our own error follows. For the whole process, since filters are not made for threads.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


class UnfitImageError(DataError):
    """An image that cannot be used; the message follows the image's name in a sentence."""


@dataclass(frozen=True)
class Decoder:
    """Decodes images to squares of one size.

    The EXIF orientation is applied, transparency lies on white, every mode becomes RGB, greys of
    16 bits are scaled to 8. The centre is cropped to the shorter side and resized with Pillow's
    antialiased bicubic filter; an image that has the size already keeps every bit.

    Attributes:
        size: side S of the squares in pixels.
        exact: refuse images that are not S x S.
    """

    size: int
    exact: bool = False

    def __call__(self, encoded: bytes | Path) -> Tensor:
        """Returns the image as uint8 (3, S, S), in RGB order.

        Raises:
            UnfitImageError: it cannot be read, is too large, is made of floats, or has another
                size than the exact one.
        """
        image, _ = self.first_frame(encoded)
        return image

    def first_frame(self, encoded: bytes | Path) -> tuple[Tensor, bool]:
        """Returns the image, and whether it is the first of several, as in an animation.

        Raises:
            UnfitImageError: as for a call.
        """
        try:
            source = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
            with Image.open(source, formats=FORMATS) as image:
                return self._square(image), _has_frames(image)
        except UnfitImageError:
            raise
        except UnidentifiedImageError as error:
            known = ", ".join(FORMATS)
            raise UnfitImageError(f"is unreadable: not an image ({known})") from error
        # Pillow's readers raise nearly anything on damaged files.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise UnfitImageError(f"is unreadable: {reason}") from error

    def _square(self, image: Image.Image) -> Tensor:
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise UnfitImageError(f"is too large: {width}x{height} pixels")
        if self.exact and (width, height) != (self.size, self.size):
            raise UnfitImageError(
                f"is {width}x{height} pixels, but the protocol says {self.size}x{self.size}"
            )
        image = _rgb(ImageOps.exif_transpose(image))
        side = min(width, height)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
        if side != self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())


def _has_frames(image: Image.Image) -> bool:
    if image.format in _FRAMED:
        # The frame that is used was read already: what is wrong with others does not matter.
        with contextlib.suppress(Exception):
            return bool(getattr(image, "is_animated", False))
    return False


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise UnfitImageError("is made of floats, whose range is not known")
    if image.mode in _WIDE:
        # Pillow itself would cut everything above 255 off.
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise UnfitImageError("has greys outside 0 to 65535, whose range is not known")
        image = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        image = Image.alpha_composite(white, coloured)
    return image.convert("RGB")
