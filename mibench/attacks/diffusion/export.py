"""A trained prior as a folder: diffusers' layout, which loads again, and samples to look at."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import torch as safetensors_torch
from torch import Tensor

from mibench.attacks.diffusion.denoiser import Prior
from mibench.attacks.diffusion.pretrained import OWN
from mibench.files import Json, ensure_writable, pretty_json, write_atomically

SHEET = "samples.png"
LEAST_SIDE = 64
"""Least side of a shown sample in pixels: a smaller one is enlarged by a whole factor."""
_GAP = 4


def write_prior(prior: Prior, notes: Mapping[str, Json], out: Path) -> None:
    """Writes a prior of pixels so that ``prior.pretrained`` can name the folder.

    Args:
        prior: the trained prior.
        notes: what to note beside it; ``saw`` says which images it was trained on.
        out: the folder.

    Raises:
        StorageError: something cannot be written.
    """
    unet: Any = prior.unet
    for part in ("unet", "scheduler"):
        ensure_writable(out / part)
    tensors = {name: value.contiguous().cpu() for name, value in unet.state_dict().items()}
    weights: bytes = safetensors_torch.save(tensors, {"format": "pt"})
    write_atomically(out / "unet" / "diffusion_pytorch_model.safetensors", weights)
    write_atomically(out / "unet" / "config.json", unet.to_json_string().encode())
    schedule = prior.scheduler.to_json_string().encode()
    write_atomically(out / "scheduler" / "scheduler_config.json", schedule)
    # Last: with it the folder is whole.
    write_atomically(out / OWN, pretty_json({**notes, "patch": prior.patch}))


def write_sheet(images: Tensor, columns: int, path: Path) -> None:
    """Writes images (N, 3, H, W) in [0, 1] as one PNG, ``columns`` in a row.

    Raises:
        StorageError: it cannot be written.
    """
    pixels = (images.detach().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    height, width = pixels.shape[1:3]
    factor = max(1, -(-LEAST_SIDE // min(height, width)))
    size = (width * factor, height * factor)
    rows = -(-len(pixels) // columns)
    room = (columns * (size[0] + _GAP) + _GAP, rows * (size[1] + _GAP) + _GAP)
    sheet = Image.new("RGB", room, (255, 255, 255))
    for place, picture in enumerate(pixels):
        row, column = divmod(place, columns)
        large = Image.fromarray(picture).resize(size, Image.Resampling.NEAREST)
        sheet.paste(large, (_GAP + column * (size[0] + _GAP), _GAP + row * (size[1] + _GAP)))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())
