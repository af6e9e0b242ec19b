"""What the bytes of a file are, told without loading them."""

from __future__ import annotations

import json
import pickletools

ARCHIVES = {
    b"PK\x03\x04": "a zip archive", b"PK\x05\x06": "a zip archive", b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive", b"\xfd7zXZ\x00": "an xz archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a rar archive", b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"\x04\x22\x4d\x18": "an lz4 archive",
}  # fmt: skip
PROGRAMS = {
    b"\x7fELF": "a program", b"MZ": "a program", b"\xcf\xfa\xed\xfe": "a program",
    b"\xca\xfe\xba\xbe": "a program", b"\x93NUMPY": "a numpy file, which may hold a pickle",
}  # fmt: skip
SIZES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes of one value, by the names that safetensors gives to types."""
LARGEST_HEADER = 2**20
HIDDEN = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200b\u200e\u200f\ufeff"
"""Characters that make text read otherwise than it runs."""


def foreign(data: bytes) -> str | None:
    """Says what a file is that has no place in a submission; None where nothing is seen."""
    for magics in (ARCHIVES, PROGRAMS):
        for magic, what in magics.items():
            if data.startswith(magic):
                return what
    if data[257:262] == b"ustar":
        return "a tar archive"
    return "a pickle, which runs code when it is loaded" if is_pickle(data) else None


def is_pickle(data: bytes) -> bool:
    """Says whether bytes are a pickle of any protocol; nothing of it is carried out."""
    if len(data) > 1 and data[0] == 0x80 and data[1] <= 5:
        # Any file of tensors that begins like this would have to be of a very odd length.
        return not _fits_safetensors(data)
    steps = 0
    try:
        for _, _, at in pickletools.genops(data):
            steps += 1
            last = at
    except Exception:  # pickletools raises nearly anything
        return False
    return steps > 1 and last is not None and last + 1 >= len(data.rstrip(b"\n"))


def _fits_safetensors(data: bytes) -> bool:
    return not safetensors_problems(data)


def text_problems(data: bytes) -> list[tuple[int, str]]:
    """Returns the lines of a text file that are no plain text, with the reason."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return [(data[: error.start].count(b"\n") + 1, "is not UTF-8 text")]
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        bad = next((c for c in line if (ord(c) < 32 and c not in "\t\r") or c in HIDDEN), None)
        if bad is not None:
            words = f"holds the character U+{ord(bad):04X}, which can hide what stands there"
            found.append((number, words))
    return found


def safetensors_problems(data: bytes) -> list[str]:
    """Returns what is wrong with the header of a safetensors file; no tensor is made of it."""
    if len(data) < 8:
        return ["is no safetensors file: it has no header"]
    length = int.from_bytes(data[:8], "little")
    if length > LARGEST_HEADER or 8 + length > len(data):
        return [f"is no safetensors file: a header of {length} bytes does not fit"]
    twice: list[str] = []

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = [name for name, _ in pairs]
        twice.extend(name for name in set(names) if names.count(name) > 1)
        return dict(pairs)

    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        return ["is no safetensors file: its header is no JSON"]
    if not isinstance(header, dict):
        return ["is no safetensors file: its header names no tensors"]
    found = [f"names the tensor {name[:60]!r} twice" for name in twice]
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        found.append("has metadata that are no text")
    pieces = []
    for name, one in header.items():
        piece = _piece(one)
        if piece is None:
            found.append(f"describes the tensor {name[:60]!r} in a way that contradicts itself")
        else:
            pieces.append(piece)
    end = 0
    if not found:
        for low, high in sorted(pieces):
            if low != end:
                found.append(f"has tensors that overlap or a gap, at byte {low}")
                break
            end = high
    if not found and end != len(data) - 8 - length:
        found.append(f"has {len(data) - 8 - length - end} bytes behind its last tensor")
    return found


def _piece(one: object) -> tuple[int, int] | None:
    """First and last byte of a tensor, if its type, shape and place agree."""
    if not isinstance(one, dict) or set(one) != {"dtype", "shape", "data_offsets"}:
        return None
    size, shape, offsets = SIZES.get(str(one["dtype"])), one["shape"], one["data_offsets"]
    if size is None or not isinstance(shape, list) or not isinstance(offsets, list):
        return None
    if len(offsets) != 2 or not all(_is_count(value) for value in [*shape, *offsets]):
        return None
    for side in shape:
        size *= side
    low, high = offsets
    return (low, high) if high - low == size else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
