"""``submission.yaml``: what a submission says of itself."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, JsonValue

from mibench.params import Parameters

FORMAT = 1
"""Version of ``submission.yaml`` that this code reads."""
FILE = "submission.yaml"
NAME = r"^(?=.{2,40}$)[a-z][a-z0-9]*(-[a-z0-9]+)*$"
"""Lower-case letters, digits and single dashes between them; a letter comes first."""
PLACEHOLDER = "FILL IN"
"""Stands in a new folder where its author has to write something."""
LICENCES = (
    "0BSD", "AGPL-3.0-only", "AGPL-3.0-or-later", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause",
    "CC-BY-4.0", "CC-BY-SA-4.0", "CC0-1.0", "EUPL-1.2", "GPL-2.0-only", "GPL-2.0-or-later",
    "GPL-3.0-only", "GPL-3.0-or-later", "ISC", "LGPL-2.1-only", "LGPL-2.1-or-later",
    "LGPL-3.0-only", "LGPL-3.0-or-later", "MIT", "MPL-2.0", "Unlicense",
)  # fmt: skip
"""SPDX identifiers of licences that let others run the code and show its results."""
RANGES = {
    "accuracy": (0.0, 1.0), "mse": (0.0, 1.0), "psnr": (0.0, 60.0), "ssim": (-1.0, 1.0),
    "lpips": (0.0, 2.0), "recognition": (0.0, 1.0), "reid-top1": (0.0, 1.0),
    "reid-top5": (0.0, 1.0), "reid-mrr": (0.0, 1.0),
}  # fmt: skip
"""What can be claimed, and between which bounds. Shares are shares, not per cent."""


def plain(text: str) -> str:
    """Refuses text that could be taken for a page's own, or that could steer a terminal.

    Raises:
        ValueError: says what is wrong.
    """
    for character in text:
        if character in "<>":
            raise ValueError(f"holds {character!r}: no HTML here, write words")
        if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
            raise ValueError(
                f"holds the control character U+{ord(character):04X}; write one line of plain text"
            )
    if text != text.strip():
        raise ValueError("begins or ends with blanks")
    if PLACEHOLDER in text:
        raise ValueError(f"still says {PLACEHOLDER!r}; write it")
    return text


def _licence(text: str) -> str:
    if text not in LICENCES:
        raise ValueError(f"is none of the SPDX identifiers {', '.join(LICENCES)}")
    return text


def _address(text: str) -> str:
    if not re.fullmatch(r"https://[A-Za-z0-9.-]+\.[A-Za-z]{2,}(:\d+)?(/[^\s\"'\\`{}|^]*)?", text):
        raise ValueError("is no https address")
    return text


def _paper(text: str) -> str:
    if re.fullmatch(r"arXiv:\d{4}\.\d{4,5}(v\d+)?|doi:10\.\d{4,9}/[^\s\"'\\`{}|^]+", text):
        return text
    if text.startswith("https://"):
        return _address(text)
    raise ValueError("is none of arXiv:2501.00824, doi:10.1000/182 and an https address")


def _trained_on(text: str) -> str:
    if text in ("train", "auxiliary", "none") or re.fullmatch(r"other: \S.*", text):
        return text
    raise ValueError("is none of train, auxiliary, none and 'other: what, and its licence'")


def _own_file(text: str) -> str:
    if "/" in text or "\\" in text or text.startswith("."):
        raise ValueError("is no name of a file in the folder itself; nothing outside it is read")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.safetensors", text):
        raise ValueError("is no name of a .safetensors file")
    return text


def _id(text: str) -> str:
    if not re.fullmatch(NAME, text):
        raise ValueError(
            "is no name: use 2 to 40 lower-case letters, digits and dashes, a letter first"
        )
    return text


Text = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(plain)]
Id = Annotated[str, AfterValidator(_id)]


class Weights(Parameters):
    """A file of tensors that the code reads.

    Attributes:
        file: its name in the folder; safetensors.
        sha256: of its content.
    """

    file: Annotated[str, AfterValidator(_own_file)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Entrant(Parameters):
    """A defense that a submitted attack is run against.

    Attributes:
        name: of a built-in defense.
        params: those that differ from the defaults.
    """

    name: Id
    params: dict[str, JsonValue] = Field(default_factory=dict)


class Submission(Parameters):
    """All of ``submission.yaml``.

    Attributes:
        format_version: 1.
        name: that of the folder. Also the name that the component has on the board.
        kind: ``defense`` or ``attack``.
        title: of the method, in a few words.
        authors: their names, or that of a team.
        contact: how to reach them: an address of mail or web; shown to everybody.
        paper: ``arXiv:2501.00824``, ``doi:10.1000/182`` or an https address.
        code: https address of the authors' own code, where that is elsewhere too.
        licence: SPDX identifier of code and weights in the folder.
        component: ``defense.py:Class`` or ``attack.py:Class`` in the folder, or the name of a
            built-in, whose parameters are then what is submitted.
        params: parameters of the component that differ from its defaults.
        targets: for an attack: the built-in defenses that it is run against.
        protocols: ids of released protocols that it is scored under.
        seeds: of the runs.
        training_data: what the code or its weights learned from: ``train`` (the protocol's train
            role, which its training is given), ``auxiliary`` (attacks alone), ``none``, or
            ``other: what, and its licence`` for each further set.
        randomness: ``none``: one image has one message (or reconstruction); ``fresh``: new draws
            every time.
        weights: safetensors in the folder that the code reads; the trained ones are not among them.
        claims: by protocol, numbers of the authors' own. Shown beside ours and never ranked.
        supersedes: name of an earlier submission that this one takes the place of.
    """

    format_version: Literal[1]
    name: Id
    kind: Literal["defense", "attack"]
    title: Text
    authors: Annotated[list[Text], Field(min_length=1, max_length=50)]
    contact: Text | None = None
    paper: Annotated[Text, AfterValidator(_paper)] | None = None
    code: Annotated[Text, AfterValidator(_address)] | None = None
    licence: Annotated[str, AfterValidator(_licence)]
    component: Annotated[str, Field(min_length=1, max_length=200), AfterValidator(plain)]
    params: dict[str, JsonValue] = Field(default_factory=dict)
    targets: list[str | Entrant] = Field(default_factory=list, max_length=50)
    protocols: Annotated[list[str], Field(min_length=1, max_length=20)]
    seeds: list[Annotated[int, Field(ge=0, lt=2**31)]] = Field(
        default_factory=lambda: [0], min_length=1
    )
    training_data: Annotated[
        list[Annotated[Text, AfterValidator(_trained_on)]], Field(min_length=1, max_length=20)
    ]
    randomness: Literal["none", "fresh"]
    weights: Annotated[list[Weights], Field(max_length=20)] = Field(default_factory=list)
    claims: dict[str, dict[str, float]] = Field(default_factory=dict)
    supersedes: Id | None = None

    @property
    def file(self) -> str | None:
        """Name of the component's file in the folder; None for a built-in."""
        return self.component.rpartition(":")[0] or None

    @property
    def entrants(self) -> list[Entrant]:
        """The defenses that an attack is run against, each with its parameters."""
        return [one if isinstance(one, Entrant) else Entrant(name=one) for one in self.targets]
