"""The board as Markdown, CSV, LaTeX and JSON: pure functions of it, the same bytes each time."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from mibench.board import rules
from mibench.board.model import FORMAT, Board, Row, Section
from mibench.files import Json, pretty_json
from mibench.record import Score

SHORT = 20
"""Rows of the table in the README, at most."""
DIGITS = 6
"""Decimals in JSON and CSV."""
NONE = "-"
"""What a cell without a number holds."""
_NAMES = {"ssim": "SSIM", "psnr": "PSNR", "lpips": "LPIPS", "reid-top1": "found",
          "recognition": "recognised"}  # fmt: skip
_PLACES = {"psnr": 1, "ssim": 2, "lpips": 2, "reid-top1": 2, "recognition": 2}
_SHOWN = ("ssim", "reid-top1", "psnr", "lpips")


def render(board: Board) -> dict[str, bytes]:
    """Makes all tables.

    Returns:
        Contents by path below ``site/``.
    """
    return {
        "board.json": pretty_json(described(board)),
        "board.csv": as_csv(board).encode(),
        "board.md": as_markdown(board).encode(),
        "board.tex": as_latex(board).encode(),
    }


def _plain(text: str) -> str:
    """Text on one line, without what cannot be printed."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


# --- words ---------------------------------------------------------------------------------------


def place(row: Row) -> str:
    """The rank as text: ``2``, or ``2 to 4`` where intervals overlap."""
    if row.rank is None:
        return NONE
    best, worst = row.rank
    return str(best) if best == worst else f"{best} to {worst}"


def number(score: Score | None, digits: int = 2) -> str:
    """A number with its interval, such as ``0.80 (0.79 to 0.82)``."""
    if score is None or score.value is None:
        return NONE
    value = f"{score.value:.{digits}f}"
    if score.ci_low is None or score.ci_high is None:
        return value
    return f"{value} ({score.ci_low:.{digits}f} to {score.ci_high:.{digits}f})"


def accuracy(row: Row) -> str:
    """Accuracy in per cent, or nothing where it is not known."""
    return NONE if math.isnan(row.accuracy) else f"{100 * row.accuracy:.1f} %"


def _drop(row: Row) -> str:
    # Not "-0.0" for what is rounded away.
    return NONE if math.isnan(row.drop) else f"{round(row.drop, 1) + 0.0:.1f}"


def _mark(row: Row) -> str:
    return "yes" if row.pareto else ""


def _heading(section: Section) -> str:
    return f"{section.protocol.id}: {section.dataset}, {section.backbone}"


_Columns = Mapping[str, Callable[[Row], str]]


def _columns() -> _Columns:
    """Columns of the Markdown and LaTeX tables."""

    def gains(row: Row) -> str:
        return " / ".join(number(row.gain.get(name)) for name in rules.KEYS)

    found: dict[str, Callable[[Row], str]] = {
        "rank": place,
        "defense": lambda row: row.label,
        "badge": lambda row: row.level.value,
        "attack": lambda row: row.attack,
        "accuracy": accuracy,
        "points lost": _drop,
    }
    for name in rules.KEYS:
        found[_NAMES[name]] = lambda row, name=name: number(  # type: ignore[misc]
            row.scores.get(name), _PLACES[name]
        )
    for name in rules.KEYS:
        found[f"leakage ({_NAMES[name]})"] = lambda row, name=name: number(  # type: ignore[misc]
            row.leakage.get(name)
        )
    found["gain over noise (SSIM / found)"] = gains
    return found


# --- Markdown ------------------------------------------------------------------------------------

_PLAIN = set(" .,()=-%/+:'")


def markdown_escaped(text: str) -> str:
    """Text that shows as itself in Markdown: no mark-up, no link, no cell, no person named."""
    out = []
    for c in _plain(text):
        if c.isalnum() or c in _PLAIN:
            out.append(c)
        else:
            # An entity is never mark-up. The empty space keeps a name from being called.
            out.append(f"&#{ord(c)};" + ("&#8203;" if c == "@" else ""))
    return "".join(out).replace("://", "&#58;//").replace("www.", "www&#46;")


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table; all cells are escaped, the head is not."""
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for cells in lines:
        yield f"| {' | '.join(markdown_escaped(cell) or ' ' for cell in cells)} |"


def as_markdown(board: Board) -> str:
    """All sections: ranked rows, then the others with the reasons."""
    lines = [f"# Leaderboard {markdown_escaped(board.version)}", ""]
    columns = _columns()
    for section in board.sections:
        lines += [f"## {markdown_escaped(_heading(section))}", ""]
        ranked = [row for row in section.rows if row.ranked]
        others = [row for row in section.rows if not row.ranked]
        if ranked:
            cells = [[*(make(row) for make in columns.values()), _mark(row)] for row in ranked]
            lines += [*markdown_table([*columns, "Pareto"], cells), ""]
        if others:
            lines += ["Not ranked:", ""]
            kept = {name: make for name, make in columns.items() if name != "rank"}
            cells = [
                [*(make(row) for make in kept.values()), _mark(row), " ".join(row.reasons)]
                for row in others
            ]
            lines += [*markdown_table([*kept, "Pareto", "why"], cells), ""]
    for one in board.advisories:
        lines += [f"- {markdown_escaped(f'{one.date}, {one.id}: {one.title}. {one.text}')}"]
    return "\n".join(lines).rstrip("\n") + "\n"


def as_short_markdown(board: Board) -> str:
    """The table of the README: the first section's ranked rows, then the next best others."""
    if not board.sections:
        return "There are no rows yet.\n"
    section = board.sections[0]
    columns = _columns()
    shown = [row for row in section.rows if row.superseded_by is None][:SHORT]
    cells = [[make(row) for make in columns.values()] for row in shown]
    lines = [markdown_escaped(_heading(section)), "", *markdown_table(list(columns), cells)]
    left = len(section.rows) - len(shown)
    if left:
        lines += ["", f"{left} more rows are on the board."]
    return "\n".join(lines) + "\n"


# --- LaTeX ---------------------------------------------------------------------------------------

_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    # A bracket behind the end of a line would be read as its option.
    "[": r"{[}", "]": r"{]}",
}  # fmt: skip


def latex_escaped(text: str) -> str:
    """Text that shows as itself in LaTeX, and does nothing."""
    return "".join(_LATEX.get(c, c) for c in _plain(text))


def as_latex(board: Board) -> str:
    """One ``tabular`` for each section, for ``booktabs``; rows that are not ranked below a line."""
    columns = _columns()
    lines = ["% needs \\usepackage{booktabs}"]
    for section in board.sections:
        ends = "ll" + "l" * (len(columns) - 2)
        lines += [f"% {latex_escaped(_heading(section))}", f"\\begin{{tabular}}{{{ends}}}"]
        lines += ["\\toprule", f"{' & '.join(map(latex_escaped, columns))} \\\\", "\\midrule"]
        ranked = [row for row in section.rows if row.ranked]
        others = [row for row in section.rows if not row.ranked]
        for rows in (ranked, others):
            if rows is others and ranked and others:
                lines.append("\\midrule")
            for row in rows:
                cells = [latex_escaped(make(row)) for make in columns.values()]
                lines.append(f"{' & '.join(cells)} \\\\")
        lines += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(lines).rstrip("\n") + "\n"


# --- CSV -----------------------------------------------------------------------------------------


def csv_safe(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    plain = _plain(text)
    return f"'{plain}" if plain[:1] in ("=", "+", "-", "@") else plain


def as_csv(board: Board) -> str:
    """One line for each row of all sections; empty where there is no number."""
    buffer = io.StringIO()
    lines = [_csv_line(section, row) for section in board.sections for row in section.rows]
    names = list(dict.fromkeys(name for line in lines for name in line))
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: csv_safe(v) if isinstance(v, str) else v for k, v in line.items()})
    return buffer.getvalue()


def _csv_line(section: Section, row: Row) -> dict[str, object]:
    record = row.headline[0].record
    line: dict[str, object] = {
        "protocol": section.protocol.id,
        "content": section.protocol.content,
        "dataset": section.dataset,
        "backbone": section.backbone,
        "defense": row.label,
        "attack": row.attack,
        "seeds": " ".join(str(one.record.seed) for one in row.headline),
        "level": row.level.value,
        "rank_best": None if row.rank is None else row.rank[0],
        "rank_worst": None if row.rank is None else row.rank[1],
        "pareto": row.pareto,
        "accuracy": _rounded(row.accuracy),
        "points_lost": _rounded(row.drop),
    }
    for name in _SHOWN:
        for prefix, scores in (("", row.scores), ("leakage_", row.leakage), ("gain_", row.gain)):
            score = scores.get(name)
            for end, value in (
                ("", None if score is None else score.value),
                ("_low", None if score is None else score.ci_low),
                ("_high", None if score is None else score.ci_high),
            ):
                line[f"{prefix}{name}{end}"] = _rounded(value)
    cost = record.cost
    line |= {
        "client_flops": None if cost is None else cost.client_flops,
        "bytes_up": None if cost is None else cost.bytes_up,
        "records": " ".join(one.id for one in row.headline),
        "reasons": " ".join(row.reasons),
    }
    return line


# --- JSON ----------------------------------------------------------------------------------------


def described(board: Board) -> dict[str, Json]:
    """The whole board as plain values; `docs/leaderboard.md` describes the form."""
    return {
        "format_version": FORMAT,
        "version": board.version,
        "sections": [_section(one) for one in board.sections],
        "advisories": [one.model_dump(mode="json") for one in board.advisories],
    }


def _section(section: Section) -> dict[str, Json]:
    protocol = section.protocol
    return {
        "protocol": {"id": protocol.id, "content": protocol.content, "track": protocol.track},
        "dataset": section.dataset,
        "backbone": section.backbone,
        "floor": _scores(section.floor),
        "noise": {
            "attack": section.noise_attack,
            "points": {
                metric: [
                    {"accuracy": _rounded(at), "leakage": _score(score)} for at, score in points
                ]
                for metric, points in section.noise.items()
            },
        },
        "rows": [_row(one) for one in section.rows],
    }


def _row(row: Row) -> dict[str, Json]:
    record, entry = row.headline[0].record, row.headline[0].entry
    return {
        "label": row.label,
        "slug": row.slug,
        "defense": {
            "name": record.defense.name,
            "version": record.defense.version,
            "params": record.defense.params,
        },
        "origin": entry.origin.model_dump(mode="json"),
        "attack": row.attack,
        "level": row.level.value,
        "rank": None if row.rank is None else list(row.rank),
        "reasons": list(row.reasons),
        "pareto": row.pareto,
        "accuracy": _rounded(row.accuracy),
        "points_lost": _rounded(row.drop),
        "scores": _scores(row.scores),
        "leakage": _scores(row.leakage),
        "gain": _scores(row.gain),
        "cost": None
        if record.cost is None
        else {
            "client_flops": record.cost.client_flops,
            "client_parameters": record.cost.client_parameters,
            "bytes_up": record.cost.bytes_up,
            "bytes_down": record.cost.bytes_down,
        },
        "records": [{"id": one.id, "seed": one.record.seed} for one in row.headline],
        "others": [
            {"id": one.id, "seed": one.record.seed, "attack": one.record.attack.name}
            for one in row.others
        ],
        "claims": entry.claims,
        "advisories": [one.id for one in row.advisories],
        "superseded_by": row.superseded_by,
        "best_known": {
            metric: {
                "by": one.by,
                "level": one.level.value,
                "leakage": next(
                    _score(score)
                    for score in one.leakage
                    if score.metric in (metric, f"leakage({metric})")
                ),
            }
            for metric, one in (row.best_known or {}).items()
        },
    }


def _scores(scores: Mapping[str, Score]) -> dict[str, Json]:
    return {name: _score(score) for name, score in scores.items()}


def _score(score: Score) -> dict[str, Json]:
    """A number with its interval; reason and source where there are some."""
    found: dict[str, Json] = {
        "value": _rounded(score.value),
        "ci_low": _rounded(score.ci_low),
        "ci_high": _rounded(score.ci_high),
        "n": score.n,
    }
    if score.reason is not None:
        found["reason"] = score.reason
    if score.source is not None:
        found["source"] = score.source
    return found


def _rounded(value: float | None) -> float | None:
    # 0.0 is added, so that no number is written as -0.0.
    return None if value is None or math.isnan(value) else round(value, DIGITS) + 0.0
