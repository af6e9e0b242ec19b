"""``mibench challenge``: frozen shares for attackers, and the scores of what they send back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mibench.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from mibench.challenge.score import Answer

app = typer.Typer(
    no_args_is_help=True,
    help="Frozen shares for attackers, and the scores of what they send back.",
)
FOUND = 1
"""Exit status where the images cannot have come from the shares."""
Root = Annotated[Path, typer.Option(help="Folder of a version of the leaderboard.")]
_ROOT = Path("leaderboard/v1")
RecordFolder = Annotated[
    Path | None,
    typer.Option(
        "--record", help="Folder of the run that the challenge belongs to, instead of the board's."
    ),
]


@app.command("export")
def export(
    defense: Annotated[str, typer.Argument(help="Name of the defense, or ./file.py:Class.")],
    protocol: Annotated[str, typer.Option(help="Protocol id, or a .yaml file.")],
    out: Annotated[Path, typer.Option(help="Folder of the challenge; new or empty.")],
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A parameter of the defense, such as defense.snr_db=6; repeatable.",
        ),
    ] = None,
    seed: options.Seed = None,
    device: options.Device = "auto",
    data_root: options.DataRoot = None,
    root: Root = _ROOT,
    record: RecordFolder = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="The trained defense of the record: a folder of the cache."),
    ] = None,
) -> None:
    """Write the shares of the attacked images for outside attackers, and none of the images."""
    from mibench.cli.terminal import console as make_console
    from mibench.params import parse_assignments
    from mibench.protocol import load_protocol
    from mibench.registry import defenses

    chosen = load_protocol(protocol)
    if ":" not in defense and not defense.endswith(".py"):
        defenses.entry(defense)
    given = parse_assignments(assignments or [], ["defense", "protocol"], {defense: "defense"})
    if "protocol" in given:
        chosen = chosen.changed(given["protocol"])
    # From here on PyTorch is needed, which takes seconds to import.
    from mibench.artifacts import ArtifactStore
    from mibench.board.gallery import refusal
    from mibench.challenge.export import export as write
    from mibench.challenge.export import record_of
    from mibench.challenge.opened import ANY_ATTACK
    from mibench.cli.devices import choose_device
    from mibench.cli.display import shown
    from mibench.job import Job

    device = choose_device(device)
    job = Job(
        protocol=chosen,
        defense=defense,
        attack=ANY_ATTACK,
        defense_params=given.get("defense", {}),
        attack_params={},
        seed=chosen.seeds[0] if seed is None else seed,
        weights=weights,
    )
    belongs = record_of(job, root, record)
    console = make_console()
    with shown(console):
        made = write(job, belongs, ArtifactStore(), data_root, device, out)
    console.print(
        f"Challenge {made.id}: {made.images} images behind {made.defense.name}, record "
        f"{made.record} ({belongs.record.attack.name})",
        soft_wrap=True,
    )
    console.print(
        f"Granted: {len(made.granted)} tensors of the trained model; withheld: "
        f"{len(made.withheld) + len(made.partly)}",
        soft_wrap=True,
    )
    console.print(f"Files: {out} (challenge.yaml, shares and weights, README.md)", soft_wrap=True)
    if why := refusal(belongs.record):
        console.print(
            f"Do not publish this folder: {why}, and shares can be as good as images",
            soft_wrap=True,
        )


@app.command("score")
def score(
    folder: Annotated[Path, typer.Argument(help="Folder of the challenge.")],
    reconstructions: Annotated[Path, typer.Option(help="Folder of the images, 0000.png and on.")],
    name: Annotated[str, typer.Option(help="Name of the submission.")],
    title: Annotated[str | None, typer.Option(help="Of the attack.")] = None,
    author: Annotated[list[str] | None, typer.Option(help="Whom to credit; repeatable.")] = None,
    paper: Annotated[str | None, typer.Option(help="arXiv number, DOI or address.")] = None,
    code: Annotated[str | None, typer.Option(help="Address of the attack's code.")] = None,
    device: options.Device = "auto",
    data_root: options.DataRoot = None,
    root: Root = _ROOT,
    record: RecordFolder = None,
) -> None:
    """Score the images that an attacker has sent back, and put them on the board with credit.

    Exit status 0: scored; 1: the images are private images themselves, and nothing was written; 2:
    they are not what the challenge asks for, and all that is wrong.
    """
    from mibench.cli.terminal import console as make_console

    console = make_console()
    # PyTorch is needed, which takes seconds to import.
    from mibench.artifacts import ArtifactStore
    from mibench.board.model import Origin
    from mibench.challenge.export import find_record
    from mibench.challenge.schema import read_challenge
    from mibench.challenge.score import place_of, score_answer, write_answer
    from mibench.checks.base import caught
    from mibench.cli.devices import choose_device
    from mibench.cli.display import shown

    place = place_of(root, name)
    challenge = read_challenge(folder)
    belongs = find_record(challenge.record, root, record)
    origin = Origin(
        kind="submission",
        submission=name,
        title=title,
        authors=author or [],
        paper=paper,
        code=code,
    )
    with shown(console):
        answer = score_answer(
            challenge, belongs, reconstructions, origin, name, ArtifactStore(), data_root,
            choose_device(device),
        )  # fmt: skip
    _print(console, answer)
    if caught(answer.findings):
        console.print("Not written: these images did not come from the shares", soft_wrap=True)
        raise typer.Exit(FOUND)
    write_answer(answer, place)
    console.print(
        f"Written: {place}, level {answer.best.level}; it is shown and decides no rank",
        soft_wrap=True,
    )


def _print(console: Console, answer: Answer) -> None:
    from rich.table import Table

    from mibench.cli.table import DIGITS

    best, record = answer.best, answer.record
    table = Table(
        title=f"{best.by} against {record.defense.name} ({record.protocol.id}, seed {record.seed}),"
        f"\nbeside the record's {record.attack.name}; others: held against other originals",
        title_justify="left",
        pad_edge=False,
    )
    table.add_column("metric", no_wrap=True)
    for head in ("mean", "95 % interval", "others", "leakage", "record", "more leaked"):
        table.add_column(head, justify="right", no_wrap=True)
    own = {one.metric: one.value for one in record.scores}
    ahead = answer.ahead()
    rows = zip(best.scores, best.permuted, best.leakage, strict=True)
    for one, other, leak in rows:
        digits = DIGITS.get(one.metric, 3)

        def said(value: float | None, digits: int = digits) -> str:
            return "-" if value is None else f"{value:.{digits}f}"

        interval = "-" if one.ci_low is None else f"{said(one.ci_low)} to {said(one.ci_high)}"
        change = ahead.get(one.metric)
        table.add_row(
            one.metric.upper(), said(one.value), interval, said(other.value), said(leak.value, 3),
            said(own[one.metric]), "-" if change is None else f"{round(change, 9) + 0:+.{digits}f}",
        )  # fmt: skip
    console.print(table)
    without = [one for one in best.scores if one.value is None]
    missing = {f"leakage({one.metric})" for one in without}
    without += [one for one in best.leakage if one.value is None and one.metric not in missing]
    for one in without:
        console.print(f"No number for {one.metric}: {one.reason}", soft_wrap=True)
    for finding in answer.findings:
        console.print(f"{finding.verdict}: {finding.check}: {finding.found}", soft_wrap=True)
