"""What a challenge's folder holds, and ``challenge.yaml``, which says so."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field

from mibench.errors import RecordError
from mibench.files import Json, content_id
from mibench.params import build, parse_yaml
from mibench.protocol import Protocol
from mibench.record import AdversaryFacts, Component, ProtocolId

FORMAT = 1
"""Version of ``challenge.yaml`` that this code writes."""
CHALLENGE = "challenge.yaml"
SHARES = "shares.safetensors"
WEIGHTS = "weights.safetensors"
README = "README.md"
LARGEST = 2**20
"""Bytes of the largest ``challenge.yaml`` that is read."""
WHO = "a challenge"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Message(_Part):
    """What one server received in one transmission.

    Attributes:
        name: of the tensor in ``shares.safetensors``.
        server: that received it.
        transmission: which one, from 0.
        shape: of one image's share, without the batch axis.
        dtype: such as ``float32``.
    """

    name: str
    server: int
    transmission: int
    shape: list[int]
    dtype: str


class Challenge(_Part):
    """``challenge.yaml``: what is attacked, by whom, and what the files beside it are.

    Attributes:
        format_version: of this file.
        protocol: id, content and all values of the protocol.
        defense: what protects the images, with its parameters and the hash of its code.
        seed: of the run that the shares are from.
        adversary: who attacks: knowledge, the servers read, the screening that chose them.
        image_size: side of the images in pixels.
        images: number of images to rebuild.
        messages: the tensors of shares, in the order in which an attack gets them.
        granted: names of the tensors in ``weights.safetensors``.
        withheld: names of the weights that the adversary does not have.
        partly: of granted weights, the rows that belong to other servers and are left blank.
        attackers_images: hash over images and labels of the roles that an attacker may use.
        record: id of the record whose defense and images these are.
        mibench: version that wrote this.
        torch: version of PyTorch that made the shares.
        files: SHA-256 of the other files.
    """

    format_version: int = FORMAT
    protocol: ProtocolId
    defense: Component
    seed: int = Field(ge=0)
    adversary: AdversaryFacts
    image_size: int = Field(gt=0, le=2048)
    images: int = Field(gt=1, le=10**6)
    messages: list[Message]
    granted: list[str]
    withheld: list[str]
    partly: dict[str, list[int]] = {}
    attackers_images: dict[str, str]
    record: str = Field(pattern="^[0-9a-f]{16}$")
    mibench: str
    torch: str
    files: dict[str, str]

    @property
    def id(self) -> str:
        """Hash of the content; names the challenge."""
        return content_id(self.model_dump(mode="json"))

    def names(self) -> list[str]:
        """Returns the names of the files that are to be sent back, in the order of the images."""
        return [f"{index:04}.png" for index in range(self.images)]

    def rebuilt_protocol(self) -> Protocol:
        """Returns the protocol.

        Raises:
            RecordError: its values are not those of the protocol that is named.
            InvalidParamsError: they are no protocol of this version.
        """
        known: dict[str, Json] = {"title": f"of {self.protocol.id}"}
        found = build(Protocol, {**self.protocol.values, **known}, f"the protocol in {CHALLENGE}")
        if (found.id, found.content_id) != (self.protocol.id, self.protocol.content):
            raise RecordError(
                f"{CHALLENGE} names protocol {self.protocol.id} ({self.protocol.content}), but the "
                f"values in it are those of {found.id} ({found.content_id}); it was edited"
            )
        return found

    def to_yaml(self) -> bytes:
        """Returns the file."""
        values = self.model_dump(mode="json")
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
        return text.encode()


def read_challenge(folder: Path) -> Challenge:
    """Reads ``challenge.yaml`` and compares the files beside it with their hashes.

    Raises:
        RecordError: there is none, it cannot be read, a newer mibench wrote it, or a file beside it
            is another one.
        InvalidParamsError: a key is missing, unknown or out of range.
    """
    path = folder / CHALLENGE
    try:
        if path.stat().st_size > LARGEST:
            raise RecordError(f"{path} is larger than {LARGEST} bytes; that is no challenge")
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError as error:
        raise RecordError(
            f"no challenge at {folder}; give the folder that `mibench challenge export` has written"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path} is not a readable text file ({error})") from error
    version = values.get("format_version") if isinstance(values, Mapping) else None
    if not isinstance(values, Mapping) or not isinstance(version, int):
        raise RecordError(f"{path} is no challenge: it has no format_version")
    if version > FORMAT:
        raise RecordError(
            f"{path} has format version {version}, but this mibench reads up to {FORMAT}; install "
            "a newer mibench"
        )
    found = build(Challenge, values, str(path))
    if sorted(found.files) != [README, SHARES, WEIGHTS]:
        raise RecordError(f"{path}: 'files' must name {README}, {SHARES} and {WEIGHTS}")
    for name, digest in found.files.items():
        if _digest(folder / name) != digest:
            raise RecordError(
                f"{folder / name} is not the file that the challenge was written with; restore it"
            )
    return found


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RecordError(f"{path} cannot be read ({error.strerror}); restore it") from error
