"""What runs in the sandbox: a command of mibench, which may load submitted code.

``python -m mibench.submission.inside`` gets its orders as JSON on standard input. It puts itself
under limits before anything else is imported, tells the parent on standard error's neighbour, file
3, what holds, and becomes ``mibench``. Nothing that it says later is believed for its own sake.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from mibench.checks import confine


def main() -> None:
    """Confines this process and carries out the command."""
    orders = json.loads(sys.stdin.buffer.read())
    told = int(orders["told"])
    folder = Path(orders["folder"])
    alone = confine.namespaces()
    confine.end_with_parent()
    missing = confine.limit(confine.Limits(**orders["limits"]))
    files, tcp = confine.landlock(folder, [Path(one) for one in orders["readable"]])
    calls = confine.seccomp()
    confined = {
        "missing": missing,
        "files": files,
        "network": calls or tcp or alone,
        "processes": calls,
        "namespaces": alone,
    }
    os.write(told, json.dumps({"confined": confined}).encode() + b"\n")
    confine.watch(folder, _teller(told, os.path.realpath(orders["code"]) + os.sep))
    sys.argv = ["mibench", *orders["words"]]
    from mibench.cli import main as command

    command()


def _teller(told: int, code: str) -> Callable[[str, str], None]:
    """Passes on what code below a folder was refused; mibench itself asks for git and the like."""

    def tell(kind: str, what: str) -> None:
        frame = sys._getframe()  # noqa: SLF001 - the only way to see who asks
        while frame is not None:
            if os.path.realpath(frame.f_code.co_filename).startswith(code):
                line = json.dumps({"refused": [kind, f"{what} (line {frame.f_lineno})"]})
                os.write(told, line.encode() + b"\n")
                return
            frame = frame.f_back  # type: ignore[assignment]

    return tell


if __name__ == "__main__":
    main()
