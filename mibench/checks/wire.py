"""Messages between the trusted process and that of a component: JSON and tensors, never pickle.

A frame is two lengths (4 and 8 bytes, big-endian), a JSON object and tensors as safetensors. Who
reads a frame trusts nothing in it: lengths are bounded before anything is read, and what does not
parse is a `WireError`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mibench.files import Json

HEAD = struct.Struct(">IQ")
MOST_JSON = 8 * 2**20
"""Bytes of the JSON of a frame, at most."""
MOST_TENSORS = 2**30
"""Bytes of the tensors of a frame, at most."""


class WireError(Exception):
    """A frame that is too large, or that is none."""


def pack(header: Mapping[str, Json], tensors: Mapping[str, Tensor]) -> bytes:
    """Returns the frame of a header and named tensors, which are copied as plain, dense ones."""
    text = json.dumps(header, allow_nan=True).encode()
    # A clone of its own: safetensors refuses tensors that share memory.
    plain = {name: one.detach().cpu().contiguous().clone() for name, one in tensors.items()}
    body = save(plain) if plain else b""
    return HEAD.pack(len(text), len(body)) + text + body


def unpack(read: Callable[[int], bytes]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Reads one frame.

    Args:
        read: number of bytes → exactly so many.

    Raises:
        WireError: what comes is no frame, or a larger one than is taken.
    """
    lengths = HEAD.unpack(read(HEAD.size))
    if lengths[0] > MOST_JSON or lengths[1] > MOST_TENSORS:
        raise WireError(f"a frame of {lengths[0]} and {lengths[1]} bytes")
    text, body = read(lengths[0]), read(lengths[1])
    try:
        header = json.loads(text)
        tensors = load(body) if body else {}
    except (ValueError, SafetensorError, KeyError) as error:
        raise WireError(f"a frame that cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise WireError("a frame whose header is no JSON object")
    return header, tensors
