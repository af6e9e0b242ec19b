"""Makes a comment on a pull request out of what a run of untrusted code left behind.

Usage: ``python .ci/comment.py REPORT [LINK]``. Prints the comment. The run that wrote ``REPORT``
was free to write anything into it, so it is shown as plain text in a block of code: no link, no
picture, no mention, no HTML in it has any effect, and its length is limited. Needs nothing but
Python's own library.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LIMIT = 40_000
"""Characters of a report that are shown; a comment may have 65,536 in all."""
BYTES = 4 * LIMIT
"""What is read of the file: a character has at most 4 bytes."""
HIDDEN = re.compile(
    r"[^\n\t\x20-\x7e\xa0-\u1fff\u2010-\u2027\u2030-\u205f\u2070-\ud7ff\uf900-\ufdcf\ufe30-\ufefe"
    r"\uff00-\uffef\U00010000-\U000dffff]"
)
"""Control characters, also those that hide text or turn its direction."""


def comment(report: str, link: str = "") -> str:
    """Wraps a report.

    Args:
        report: any text.
        link: address of the run, from the trusted side.
    """
    text = HIDDEN.sub("\N{REPLACEMENT CHARACTER}", report.replace("\r\n", "\n"))
    if len(text) > LIMIT:
        text = text[:LIMIT] + f"\n... cut after {LIMIT:,} characters"
    # A fence ends only at one that is at least as long, so nothing inside can end it.
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    opening = (
        "The checks of this submission ran. What they printed, as plain text (the run had the code "
        "of this pull request in it, so read it as the submitter's own words):"
    )
    said = [opening, f"{fence}text\n{text.strip()}\n{fence}"]
    if link:
        said.append(f"The table is laid out in [the summary of the run]({link}).")
    return "\n\n".join(said) + "\n"


def main() -> int:
    """Prints the comment, or says in one line why there is none."""
    path, link = Path(sys.argv[1]), "".join(sys.argv[2:3])
    # A link could lead to any file of the machine that holds the token.
    if path.is_symlink() or not path.is_file():
        sys.stderr.write(f"error: {path.name!r} is no plain file\n")
        return 1
    with path.open("rb") as file:
        report = file.read(BYTES).decode("utf-8", "replace")
    sys.stdout.write(comment(report, link))
    return 0


if __name__ == "__main__":
    sys.exit(main())
