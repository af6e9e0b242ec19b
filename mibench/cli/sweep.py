"""``mibench sweep``: all runs of a grid, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mibench.cli import options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from mibench.sweep.runner import Run, Sweep

SHOWN = 30
"""Rows of the live table at most: what runs and failed first."""


def sweep(
    grid: Annotated[Path, typer.Argument(help="A grid file; see docs/sweeps.md.")],
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("runs/sweep"),
    device: options.Device = "auto",
    data_root: options.DataRoot = None,
    part: Annotated[
        bool, typer.Option("--part", help="As in `mibench run`: never ranked.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, run nothing.")
    ] = False,
) -> None:
    """Run a grid of defenses, attacks, protocols and seeds; a stopped sweep goes on."""
    from mibench.cli.terminal import console as make_console
    from mibench.sweep.grid import load_grid

    console = make_console()
    cells = load_grid(grid).cells()
    from mibench.cli.devices import choose_device
    from mibench.errors import InvalidParamsError
    from mibench.sweep.grid import problems
    from mibench.sweep.local import LocalExecutor
    from mibench.sweep.runner import State, Sweep, alone_in, planned

    device = choose_device(device)
    if found := problems(cells, device):
        raise InvalidParamsError(f"grid {grid}: {'; '.join(found)}")
    runs = planned(cells, out)
    if dry_run:
        console.print(_table(runs, workers))
        return
    common = ["--device", device]
    common += ["--data-root", str(data_root)] if data_root else []
    common += ["--part"] if part else []
    with alone_in(out):
        _show(console, Sweep(runs, LocalExecutor(workers), common), workers)
    failed = [run for run in runs if run.state is State.FAILED]
    for run in failed:
        console.print(f"failed: {run.cell.key}: {run.reason} ({run.log})", soft_wrap=True)
    console.print(f"{len(runs) - len(failed)} of {len(runs)} runs are done; results in {out}")
    if failed:
        raise typer.Exit(1)


def _show(console: Console, carried: Sweep, workers: int) -> None:
    """Carries a sweep out under a live table, or with a line for every change."""
    if not console.is_terminal:
        told: dict[str, str] = {}

        def tell(runs: Sequence[Run]) -> None:
            for run in runs:
                if told.get(run.cell.key, "waiting") != run.state:
                    told[run.cell.key] = run.state
                    console.print(f"{run.state}: {run.cell.key}", soft_wrap=True)

        carried.carry_out(tell)
        return
    from rich.live import Live

    with Live(console=console, refresh_per_second=2) as live:
        carried.carry_out(lambda runs: live.update(_table(runs, workers)))
    console.print(_table(carried.runs, workers))


def _table(runs: Sequence[Run], workers: int) -> Table:
    """The runs with where they stand; the first lines are those that need a look."""
    from collections import Counter

    from rich.table import Table

    from mibench.sweep.runner import State, minutes_left

    counts = Counter(run.state for run in runs)
    left = minutes_left(runs, workers)
    head = ", ".join(f"{counts[state]} {state}" for state in State if counts[state])
    head += "; left: " + ("unknown" if left is None else f"about {round(left)} min")
    table = Table(title=head, title_justify="left", box=None, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("state")
    table.add_column("minutes", justify="right")
    table.add_column("estimate", justify="right")
    urgent = {State.RUNNING: 0, State.FAILED: 1, State.WAITING: 2, State.DONE: 3, State.KEPT: 4}
    order = sorted(runs, key=lambda run: urgent[run.state])
    for run in order[:SHOWN]:
        table.add_row(run.cell.key, run.state, _minutes(run), _estimate(run))
    if len(order) > SHOWN:
        table.add_row(f"and {len(order) - SHOWN} more", "", "", "")
    return table


def _minutes(run: Run) -> str:
    import time

    if run.seconds is not None:
        return f"{run.seconds / 60:.1f}"
    if run.began is not None:
        return f"{(time.monotonic() - run.began) / 60:.1f}"
    return ""


def _estimate(run: Run) -> str:
    return "" if run.estimate is None else f"{run.estimate:.0f}"
