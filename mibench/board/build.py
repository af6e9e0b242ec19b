"""The pages as files: built from the records, written, checked against them, compared."""

from __future__ import annotations

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mibench.board import entries, layout, tables
from mibench.board.model import Board, Entry, Row
from mibench.board.rows import assemble, board_of
from mibench.errors import BoardError
from mibench.files import storage_error, write_atomically

DEEPEST = 4
"""Folders inside each other that a page's path may name."""


def build(root: Path) -> dict[str, bytes]:
    """Makes all pages and tables of a version.

    Returns:
        Contents by path below ``site/``; the same folder gives the same bytes.

    Raises:
        BoardError: something in the folder is broken or does not belong there.
    """
    return rendered(assemble(root), root)


def rendered(board: Board, root: Path) -> dict[str, bytes]:
    """Makes all pages and tables of a board."""
    from mibench.board import page

    return dict(sorted({**page.render(board, root), **tables.render(board)}.items()))


# --- writing -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """What a build has changed.

    Attributes:
        board: what was built.
        changed: paths below ``site/`` that are new or other than before, and the README.
        removed: pages that no row has any more.
        files: of the whole site.
    """

    board: Board
    changed: tuple[str, ...]
    removed: tuple[str, ...]
    files: int


def write(root: Path) -> Written:
    """Writes the pages, takes away those that no row has any more, and mends the README.

    Raises:
        BoardError: as `build`, or the README holds half of the marks.
        StorageError: something cannot be written.
    """
    board = assemble(root)
    pages, there = rendered(board, root), _site(root)
    text = _readme(root, board)
    changed = [name for name, data in pages.items() if there.get(name) != data]
    try:
        for name in changed:
            path = layout.site(root) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, pages[name])
        removed = sorted(set(there) - set(pages))
        for name in removed:
            (layout.site(root) / name).unlink()
    except OSError as error:
        raise storage_error("write in", layout.site(root), error) from error
    if text is not None:
        place = layout.readme(root)
        if place.read_bytes() != text:
            write_atomically(place, text)
            changed.append(place.name)
    return Written(board, tuple(changed), tuple(removed), len(pages))


def _site(root: Path) -> dict[str, bytes]:
    """What lies in ``site/`` now.

    Raises:
        BoardError: a link, which could lead anywhere.
    """
    site, found = layout.site(root), {}
    for path in sorted([site, *site.rglob("*")]) if site.exists() else []:
        if path.is_symlink():
            raise BoardError(f"{path} is a link; remove it and run `mibench board build`")
        if path.is_file():
            found[path.relative_to(site).as_posix()] = path.read_bytes()
    return found


def _readme(root: Path, board: Board) -> bytes | None:
    """The README with the short table; None where it holds no marks.

    Raises:
        BoardError: one of the two marks is missing, or stands there twice.
    """
    path = layout.readme(root)
    if not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BoardError(f"{path}: it is not UTF-8 text ({error.reason}); mend it") from error
    counts = (text.count(layout.BEGIN), text.count(layout.END))
    if counts == (0, 0):
        return None
    before, _, rest = text.partition(layout.BEGIN)
    _, found, after = rest.partition(layout.END)
    if counts != (1, 1) or not found:
        raise BoardError(
            f"{path}: {layout.BEGIN} and then {layout.END} must stand there once each; mend it"
        )
    table = tables.as_short_markdown(board)
    return f"{before}{layout.BEGIN}\n{table}{layout.END}{after}".encode()


# --- checking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checked:
    """A leaderboard that holds.

    Attributes:
        records: how many there are.
        rows: how many there are, and how many of them are ranked.
        bytes: of all files of all versions.
    """

    records: int
    rows: int
    ranked: int
    bytes: int


def check(root: Path) -> Checked:
    """Checks records, numbers, pages and size.

    Raises:
        BoardError: something does not hold. Broken files are told first and alone, since nothing
            follows from them; all else is told at once.
    """
    from mibench.checks.base import Verdict
    from mibench.checks.record import check_numbers

    contents = entries.read(root)
    board = board_of(contents, root.resolve().name)
    wrong = [
        f"{layout.record_folder(root, name)}: {finding.check}: {finding.found}"
        for name in contents.held
        for finding in check_numbers(layout.record_folder(root, name))
        if finding.verdict is Verdict.FAILED
    ]
    wrong += _page_problems(root, board)
    total = entries.size(root)
    if total > layout.LARGEST_BOARD:
        wrong.append(
            f"the leaderboard has {total:,} bytes, and {layout.LARGEST_BOARD:,} are allowed"
        )
    if wrong:
        raise BoardError("; ".join(wrong))
    rows = [row for section in board.sections for row in section.rows]
    return Checked(len(contents.held), len(rows), sum(row.ranked for row in rows), total)


def _page_problems(root: Path, board: Board) -> Iterator[str]:
    pages, there, site = rendered(board, root), _site(root), layout.site(root)
    remedy = "run `mibench board build`"
    for name in sorted(set(pages) | set(there)):
        if name not in there:
            yield f"{site / name} is missing; {remedy}"
        elif name not in pages:
            yield f"{site / name} is the page of no row; {remedy}"
        elif pages[name] != there[name]:
            yield f"{site / name} is not what the records give, {_first(there[name], pages[name])}"
    text, path = _readme(root, board), layout.readme(root)
    if text is not None and path.read_bytes() != text:
        yield f"{path} is not what the records give, {_first(path.read_bytes(), text)}"


def _first(had: bytes, wanted: bytes) -> str:
    """The first line in which two files differ."""
    ours, theirs = (one.decode(errors="replace").splitlines() for one in (had, wanted))
    for at in range(max(len(ours), len(theirs))):
        one, other = (lines[at] if at < len(lines) else "(nothing)" for lines in (ours, theirs))
        if one != other:
            return f"from line {at + 1} on: {_cut(one, other)} instead of {_cut(other, one)}"
    return "in its line ends"


def _cut(line: str, other: str) -> str:
    """The part of a line around its first difference from another one."""
    pairs = zip(line, other, strict=False)
    at = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(line), len(other)))
    return repr(line[max(0, at - 20) : at + 40])


# --- comparing -----------------------------------------------------------------------------------


def diff(root: Path, other: str) -> str:
    """What has changed since another state, as Markdown.

    Args:
        root: of the version as it is now.
        other: the folder of a version, or a revision of git.

    Raises:
        BoardError: there is neither, or one of the two boards is broken.
    """
    now = assemble(root)
    if Path(other).is_dir():
        return difference(assemble(Path(other)), now)
    with _at_revision(root, other) as before:
        old = assemble(before) if before.is_dir() else Board(now.version, (), ())
        return difference(old, now)


@contextmanager
def _at_revision(root: Path, revision: str) -> Iterator[Path]:
    """The folder of a version as it was in a revision; it does not exist where there was none."""
    place = root.resolve()
    if revision.startswith("-"):
        raise BoardError(f"{revision!r} is neither a folder nor a revision of git")

    def git(*words: str) -> bytes:
        asked = ["git", "-C", str(place), *words]
        done = subprocess.run(asked, capture_output=True, check=False)  # noqa: S603
        if done.returncode:
            raise BoardError(
                f"{revision!r} is neither a folder nor a revision of git here "
                f"({done.stderr.decode(errors='replace').strip()})"
            )
        return done.stdout

    prefix = git("rev-parse", "--show-prefix").decode().strip().rstrip("/")
    top = Path(git("rev-parse", "--show-toplevel").decode().strip())
    commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    above = str(Path(prefix).parent)
    names = git("-C", str(top), "ls-tree", "-r", "-z", "--name-only", commit.decode().strip(),
                "--", f"{above}/").decode().split("\0")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="mibench-board-") as folder:
        if any(names):
            data = git("-C", str(top), "archive", "--format=tar", commit.decode().strip(), "--",
                       above)  # fmt: skip
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                archive.extractall(folder, filter="data")
        yield Path(folder) / prefix


def difference(old: Board, new: Board) -> str:
    """A Markdown table of the rows that are new, gone, or have another rank or other numbers."""
    before, after = _rows(old), _rows(new)
    lines = []
    for key in [*after, *(key for key in before if key not in after)]:
        had, has = before.get(key), after.get(key)
        told = [_told(row) for row in (had, has)]
        shown = has if has is not None else had
        assert shown is not None, "it is in one of the two"
        if had is None or has is None:
            what = "new" if had is None else "gone"
        elif told[0] == told[1]:
            continue
        else:
            what = "changed"
        kept = told[1] if told[1] is not None else told[0]
        assert kept is not None, "it is in one of the two"
        cells = [
            kept[at] if told[0] is None or told[1] is None or told[0][at] == told[1][at]
            else f"{told[0][at]} -> {told[1][at]}"
            for at in range(len(kept))
        ]  # fmt: skip
        lines.append([what, key[0], shown.label, *cells])
    edited = list(_edited(old, new))
    if not lines and not edited:
        return "No row has changed.\n"
    head = ["", "protocol", "defense", *_HEAD]
    table = list(tables.markdown_table(head, lines)) if lines else ["No row has other numbers."]
    return "\n".join([*table, *([""] if edited else []), *edited]) + "\n"


def _edited(old: Board, new: Board) -> Iterator[str]:
    """What stands otherwise beside a record that was there: only a person can say if it is true."""
    before, after = _entries(old), _entries(new)
    for name in sorted(set(before) & set(after)):
        had, has = before[name], after[name]
        told = [key for key in Entry.model_fields if getattr(had, key) != getattr(has, key)]
        count = len(had.verifications)
        if "verifications" in told:
            grown = has.verifications[:count] == had.verifications
            told.remove("verifications")
            told.append("a further verification" if grown else "VERIFICATIONS WERE EDITED")
        if told:
            yield f"- entry of `{name}`: {', '.join(told)}"


def _entries(board: Board) -> dict[str, Entry]:
    return {
        one.id: one.entry
        for section in board.sections
        for row in section.rows
        for one in (*row.headline, *row.others)
    }


_HEAD = ("rank", "badge", "accuracy", "leakage (SSIM)", "leakage (found)", "why not ranked")


def _rows(board: Board) -> dict[tuple[str, str], Row]:
    return {
        (section.protocol.id, row.slug): row for section in board.sections for row in section.rows
    }


def _told(row: Row | None) -> tuple[str, ...] | None:
    if row is None:
        return None
    return (
        tables.place(row),
        row.level.value,
        tables.accuracy(row),
        tables.number(row.leakage.get("ssim"), 3),
        tables.number(row.leakage.get("reid-top1"), 3),
        " ".join(row.reasons),
    )
