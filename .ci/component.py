"""Prints the arguments with which ``mibench check`` tries a submission, each ended by a zero byte.

Usage: ``python .ci/component.py FOLDER``, where ``mibench submission validate FOLDER`` passed.
Reads ``submission.yaml``; imports nothing of the folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from mibench.submission.schema import Submission
from mibench.submission.static import load


def arguments(folder: Path, told: Submission) -> list[str]:
    """Names the component and its parameters.

    Args:
        folder: of the submission.
        told: its ``submission.yaml``.
    """
    # Its file in the folder, or the name of a built-in.
    target = f"{folder}/{told.component}" if told.file else told.component
    values = [f"--set={name}={json.dumps(value)}" for name, value in told.params.items()]
    return [target, f"--kind={told.kind}", *values]


if __name__ == "__main__":
    place = Path(sys.argv[1])
    sys.stdout.write("".join(f"{one}\0" for one in arguments(place, load(place))))
