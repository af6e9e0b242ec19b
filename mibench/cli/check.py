"""``mibench check``: whether a component does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import typer

from mibench.cli.options import DataRoot

if TYPE_CHECKING:
    from mibench.checks.base import Finding
    from mibench.checks.process import Nursery
    from mibench.checks.targets import Target
    from mibench.files import Json

FAILED = 1
"""Exit status where a check failed."""


def check(
    target: Annotated[
        str,
        typer.Argument(
            help="A registered name, ./file.py:Class, ./file.py (all components in it), or the "
            "folder of a run."
        ),
    ],
    kind: Annotated[
        Literal["defense", "attack", "metric"] | None,
        typer.Option(help="What a name is, where several kinds have it."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A parameter, as in snr_db=6; repeatable."),
    ] = None,
    data_root: DataRoot = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Try what a component could get wrong or cheat with; takes one to two minutes."""
    import time

    began = time.monotonic()
    params = _params(assignments or [])
    if Path(target).is_dir() or Path(target).name == "record.json":
        _report(_of_run(Path(target), data_root), "", time.monotonic() - began, as_json=as_json)
        return
    from mibench.checks import targets
    from mibench.checks.process import ComponentError, Nursery, isolation

    named = None if targets.is_place(target) else targets.registered(target, kind)
    place = targets.place_of(target) if named is None else ("", [])
    likely = [named.kind] if named else [kind or "defense"]
    findings: list[tuple[str, Finding]] = []
    with Nursery(targets.preload(likely)) as nursery:
        try:
            chosen = [named] if named else _found(nursery, *place, kind)
        except ComponentError as error:
            chosen = []
            findings.append((target, error.finding))
        for one in chosen:
            title = f"{one.kind} {Path(one.name).name}"
            with _Progress(title, quiet=as_json) as progress:
                found = targets.run(nursery, one, params, progress)
            findings += [(title, finding) for finding in found]
        said = isolation(nursery.confined)
    _report(findings, said, time.monotonic() - began, as_json=as_json)


def _params(assignments: list[str]) -> dict[str, Json]:
    """Parameters of ``--set``; a first word such as ``defense.`` may stand in front."""
    from mibench.params import parse_assignments

    roots = ("defense.", "attack.", "metric.")
    items = [one if one.startswith(roots) else f"component.{one}" for one in assignments]
    found: dict[str, Json] = {}
    for values in parse_assignments(items).values():
        found |= values
    return found


def _found(nursery: Nursery, place: str, classes: list[str], kind: str | None) -> list[Target]:
    """Components of a file. It is imported in a confined process, as everything else of it."""
    from mibench.checks.targets import KINDS, Target
    from mibench.errors import PluginError

    readable = [Path(place).parent] if place.endswith(".py") else []
    finder = nursery.start("finder", None, readable)
    told, _ = finder.ask("component.find", place=place, classes=list(classes))
    finder.close()
    pairs = [(str(one), str(name)) for one, name in told["found"]]
    found = [
        Target(one, f"{place}:{name}")
        for one, name in pairs
        if one in KINDS and kind in (None, one)
    ]
    if not found:
        held = ", ".join(f"{name} (a {one})" for one, name in pairs)
        raise PluginError(f"{place} holds {held}; there are checks for {', '.join(KINDS)}")
    return found


def _of_run(path: Path, data_root: Path | None) -> list[tuple[str, Finding]]:
    from mibench.artifacts import ArtifactStore
    from mibench.checks.record import check_run

    folder = path if path.is_dir() else path.parent
    cache = ArtifactStore().root
    return [(f"run {folder.name}", finding) for finding in check_run(folder, data_root, cache)]


class _Progress:
    """Says on standard error what is being tried: one line that changes, or plain lines."""

    def __init__(self, title: str, *, quiet: bool) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, markup=False, highlight=False, quiet=quiet)
        self._title = title
        self._status = self._console.status(f"checking {title}")

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, what: str) -> None:
        if self._console.is_terminal:
            self._status.update(f"checking {self._title}, {what}")
        else:
            self._console.print(f"checking {self._title}, {what}", soft_wrap=True)


def _report(
    findings: list[tuple[str, Finding]], isolation: str, seconds: float, *, as_json: bool
) -> None:
    """Prints the findings and ends with the exit status that they deserve."""
    from mibench.checks.base import Verdict

    counts = {one: sum(finding.verdict is one for _, finding in findings) for one in Verdict}
    if as_json:
        _print_json(findings, isolation, seconds)
    else:
        _print_table(findings, isolation)
        total = ", ".join(f"{count} {one.value}" for one, count in counts.items() if count)
        typer.echo(f"{total or 'nothing to check'}, {seconds:.0f} s")
    if counts[Verdict.FAILED]:
        raise typer.Exit(FAILED)


def _print_json(findings: list[tuple[str, Finding]], isolation: str, seconds: float) -> None:
    import dataclasses
    import json

    told = {
        "findings": [{"of": title, **dataclasses.asdict(one)} for title, one in findings],
        "isolation": isolation,
        "seconds": round(seconds, 1),
    }
    typer.echo(json.dumps(told, indent=2, ensure_ascii=False))


def _print_table(findings: list[tuple[str, Finding]], isolation: str) -> None:
    from rich.table import Table

    from mibench.checks.base import Verdict
    from mibench.cli.terminal import console as make_console

    console = make_console()
    for title in dict.fromkeys(title for title, _ in findings):
        console.print(title)
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("check", no_wrap=True)
        table.add_column("verdict", no_wrap=True)
        table.add_column("found", overflow="fold")
        for name, one in findings:
            if name == title:
                table.add_row(one.check, one.verdict.value, one.found)
        console.print(table)
    for verdict in (Verdict.FAILED, Verdict.WARNED):
        for title, one in findings:
            if one.verdict is verdict:
                console.print(
                    f"\n{verdict.value.upper()} {one.check} ({title})\n"
                    f"  tried: {one.tried}\n  found: {one.found}\n  to do: {one.advice}",
                    soft_wrap=True,
                )
    if isolation:
        console.print(f"\n{isolation}", soft_wrap=True)
