"""``mibench run``: one defense against one attack under one protocol."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mibench.cli import options

if TYPE_CHECKING:
    from rich.console import Console

    from mibench.files import Json
    from mibench.job import Job
    from mibench.protocol import Protocol
    from mibench.record import Record

ATTACKERS_IMAGES = {
    "training": "has the training images themselves",
    "disjoint": "has other images of the same kind",
    "other": "has images of another dataset",
}
SMOKE = "procedural-smoke-v1"
RANKED = "cifar10-lite-v1"


def run(
    defense: Annotated[
        str, typer.Option(help="Name (see `mibench list defenses`) or ./file.py:Class.")
    ],
    attack: Annotated[
        str,
        typer.Option(
            help="Name (see `mibench list attacks`), ./file.py:Class, or `suite`: all attacks that "
            "the protocol names, then the worst of them for each image."
        ),
    ],
    protocol: Annotated[
        str | None,
        typer.Option(help=f"Protocol id, or a .yaml file (default: {SMOKE}, never ranked)."),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A parameter, such as defense.density=0.04 or attack.steps=50; repeatable. The "
            "name works too: privdfs.density=0.04. protocol.adversary.coalition=2 changes the "
            "protocol, and is never ranked.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Other images than the protocol's: a folder with a sub-folder per class or with "
            "parquet files (./pictures/), or a name. Never ranked."
        ),
    ] = None,
    part: Annotated[
        bool,
        typer.Option(
            "--part",
            help="Where the data folder holds only a part of the dataset, shrink all roles in "
            "proportion instead of refusing. Never ranked.",
        ),
    ] = False,
    seed: options.Seed = None,
    device: options.Device = "auto",
    data_root: options.DataRoot = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results (default: runs/<protocol>/<defense>-<attack>-s<seed>)."
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Use this trained defense instead of training one: a folder of the cache, such "
            "as CACHE/defense/0123456789abcdef (the record of its run names it). Never ranked."
        ),
    ] = None,
    converge: Annotated[
        bool,
        typer.Option(
            "--converge",
            help="Make each attack on the defense again with twice its budget, and say what that "
            "gains.",
        ),
    ] = False,
    every_coalition: Annotated[
        bool,
        typer.Option(
            "--every-coalition",
            help="Attack from each coalition of the protocol's size, not only from the one that "
            "the screening finds worst, and take the worst of them for each image. Takes that "
            "many times as long. Never ranked.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, run nothing.")
    ] = False,
) -> None:
    """Attack a defense, score what leaks, and write a record."""
    from mibench.cli.terminal import console as make_console

    console = make_console()
    if protocol is None:
        console.print(
            f"No --protocol given, so this is {SMOKE}: it shows that everything works and is never "
            f"ranked. For a ranked result: --protocol {RANKED}",
            soft_wrap=True,
        )
    chosen, given = _check_names(protocol or SMOKE, defense, attack, assignments or [])
    # From here on PyTorch is needed, which takes seconds to import.
    from mibench.cli.devices import choose_device
    from mibench.files import ensure_writable
    from mibench.job import Job

    device = choose_device(device)
    chosen = _with_data(chosen, dataset, data_root, part=part)
    job = Job(
        protocol=chosen,
        defense=defense,
        attack=attack,
        defense_params=given.get("defense", {}),
        attack_params=given.get("attack", {}),
        seed=chosen.seeds[0] if seed is None else seed,
        weights=weights,
        converge=converge,
        every_coalition=every_coalition,
    )
    record, coalitions = _check_components(job, device)
    named: dict[str, Json] = {"dataset": dataset} if dataset else {}
    if weights is not None:
        named["weights"] = weights.resolve().name
    if converge:
        named["converge"] = True
    if every_coalition:
        named["every_coalition"] = True
    folder = out or default_folder(record, {**given, "data": named} if named else given)
    found = earlier_record(folder, record)
    if not dry_run:
        ensure_writable(folder)
    _print_plan(console, job, record, folder, coalitions if every_coalition else 1)
    if dry_run:
        return
    _run(console, job, record, found, device, data_root, folder)


def default_folder(record: Record, given: dict[str, dict[str, Json]]) -> Path:
    """Returns ``runs/<protocol>/<defense>-<attack>[-<hash of what was set>]-s<seed>``."""
    from mibench.files import content_id, plain_name

    names = [record.defense.name, record.attack.name]
    if given:
        names.append(content_id(given, length=8))
    leaf = "-".join([*names, f"s{record.seed}"])
    return Path("runs", plain_name(record.protocol.id), plain_name(leaf))


def earlier_record(folder: Path, record: Record) -> Record | None:
    """Returns the record that an earlier start of the same run left in a folder, if any.

    Raises:
        StorageError: the folder holds the record of another run, which must not be lost.
        RecordError: it holds a record that cannot be read.
    """
    from mibench.errors import StorageError
    from mibench.record import read_record

    if not (folder / "record.json").exists():
        return None
    found = read_record(folder)
    if found.status == "error":  # nothing would be lost
        return found
    was, now = _identity(found), _identity(record)
    differing = [key for key in {**was, **now} if was.get(key) != now.get(key)]
    if differing:
        key = differing[0]
        raise StorageError(
            f"{folder} holds the record of another run (there {key} is {was.get(key)!r}, here "
            f"{now.get(key)!r}); choose another --out, or move that folder away"
        )
    return found


def _identity(record: Record) -> dict[str, object]:
    """What tells one run from another, by the names that a user knows."""
    return {
        "defense": record.defense.name,
        "code of the defense": record.defense.code,
        "attack": record.attack.name,
        "code of the attack": record.attack.code,
        "protocol": record.protocol.id,
        "seed": record.seed,
        "weights": [one for one in record.deviations if "weights" in one],
        "--converge": record.convergence is not None,
        "coalitions": [one for one in record.deviations if "coalition" in one],
        **{f"defense.{key}": value for key, value in record.defense.params.items()},
        **{f"attack.{key}": value for key, value in record.attack.params.items()},
        "content of the protocol": record.protocol.content,
    }


def estimate_minutes(
    protocol: Protocol, defense: str, attack: str, coalitions: int = 1
) -> float | None:
    """Returns about how many minutes a run takes on two CPU cores; None where nobody measured.

    All but the judge, and what an attack learns once for all targets, counts twice for a defended
    run: the undefended reference is trained and attacked too. Each coalition is attacked on its
    own.
    """
    from mibench.job import SUITE

    times = protocol.minutes
    names = list(protocol.attacks) if attack == SUITE else [attack]
    if not {"defense", *names} <= set(times):
        return None
    attacking = sum(times[name] for name in names)
    per_target = times["defense"] + attacking + times.get("information", 0.0)
    # What several attacks of a suite learn once, such as a prior, they share.
    once = max(times.get(f"{name} once", 0.0) for name in names)
    once += (coalitions - 1) * attacking
    return per_target * (1 if defense == "none" else 2) + once + times.get("judge", 0.0)


def _check_names(
    protocol: str, defense: str, attack: str, assignments: list[str]
) -> tuple[Protocol, dict[str, dict[str, Json]]]:
    """Everything that can be checked without PyTorch, so that a typing error shows at once."""
    from mibench.job import SUITE
    from mibench.params import parse_assignments
    from mibench.protocol import load_protocol
    from mibench.registry import attacks, defenses

    chosen = load_protocol(protocol)
    named = [(defenses, defense)] + ([] if attack == SUITE else [(attacks, attack)])
    for registry, name in named:
        if ":" not in name and not name.endswith(".py"):
            registry.entry(name)
    own = list(chosen.attacks) if attack == SUITE else ["attack"]
    given = parse_assignments(
        assignments, ["defense", *own, "protocol"], {defense: "defense", attack: "attack"}
    )
    if "protocol" in given:
        chosen = chosen.changed(given.pop("protocol"))
    if attack == SUITE:
        by_attack = {name: given.pop(name) for name in own if name in given}
        if by_attack:
            given["attack"] = by_attack  # type: ignore[assignment]
    return chosen, given


def _check_components(job: Job, device: str) -> tuple[Record, int]:
    """Everything else that can be checked before anything is trained; counts the coalitions."""
    from mibench.artifacts import ArtifactStore
    from mibench.assault import coalitions_of
    from mibench.data.roles import open_dataset
    from mibench.deployment import build_defense, load_weights
    from mibench.evaluate import open_record

    rule = job.protocol.data
    dataset = open_dataset(rule.dataset, rule.image_size, None, ArtifactStore().root)
    record = open_record(job, device)
    built = build_defense(job, (3, rule.image_size, rule.image_size), dataset.task)
    if job.weights is not None:
        load_weights(built, job)
    return record, len(coalitions_of(job.protocol.adversary, built))


def _with_data(
    protocol: Protocol, dataset: str | None, data_root: Path | None, *, part: bool
) -> Protocol:
    """Returns the protocol on the user's own images, or on the part of the dataset that is there.

    Raises:
        MibenchError: there is no such dataset, or it cannot be read or does not fit.
    """
    if dataset is None and not part:
        return protocol
    from mibench.artifacts import ArtifactStore
    from mibench.cli.display import shown
    from mibench.cli.terminal import console
    from mibench.data.folder import Folder
    from mibench.data.roles import open_dataset
    from mibench.data.rules import fitted, own_rule
    from mibench.errors import DataError, InvalidParamsError
    from mibench.protocol import is_folder

    if data_root is not None and not data_root.is_dir():
        raise DataError(f"--data-root: there is no folder {data_root}")
    cache, rule = ArtifactStore().root, protocol.data
    with shown(console()):
        if dataset is not None and is_folder(dataset):
            if protocol.adversary.auxiliary != "disjoint":
                raise InvalidParamsError(
                    f"{protocol.id} gives the attacker images of the kind "
                    f"{protocol.adversary.auxiliary!r}, and a folder of your own has no rule for "
                    "that; write the roles into a protocol of your own"
                )
            rule = own_rule(Folder(Path(dataset), rule.image_size, cache), rule)
        elif dataset is not None and dataset != rule.dataset:
            open_dataset(dataset, rule.image_size, data_root, cache)
            rule = rule.of(dataset)
        if part:
            rule = fitted(rule, data_root, cache)
    return protocol if rule == protocol.data else protocol.on(rule)


def _print_plan(console: Console, job: Job, record: Record, folder: Path, coalitions: int) -> None:
    from rich.table import Table

    data, rule = job.protocol.data, job.protocol.adversary
    minutes = estimate_minutes(job.protocol, record.defense.name, record.attack.name, coalitions)
    duration = "unknown: nobody has measured this pair under this protocol"
    if minutes is not None:
        duration = (
            f"{_spelled_minutes(minutes)} on two CPU cores; "
            "parts already in the cache make it shorter"
        )
    servers = "one server" if rule.coalition == 1 else f"up to {rule.coalition} servers"
    if coalitions > 1:
        servers += f", each of {coalitions} coalitions in turn"
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in (
        ("defense", _component(record.defense.name, job.defense_params)),
        ("attack", _component(record.attack.name, job.attack_params)),
        ("protocol", f"{job.protocol.id} ({job.protocol.content_id}): {job.protocol.title}"),
        ("data", f"{data.dataset}, {data.image_size}x{data.image_size} pixels"),
        ("attacked", f"the first {data.attacked} of {data.private.count or 'all'} private images"),
        ("adversary", f"{rule.knowledge}, reads {servers}, {ATTACKERS_IMAGES[rule.auxiliary]}"),
        ("seed", str(job.seed)),
        ("device", str(record.provenance["device"])),
        ("takes", duration),
        ("out", str(folder)),
    ):
        table.add_row(name, value)
    console.print(table)
    if record.deviations:
        console.print(
            f"This run departs from its protocol and is not ranked: {'; '.join(record.deviations)}",
            soft_wrap=True,
        )


def _component(name: str, given: object) -> str:
    from collections.abc import Mapping

    if not isinstance(given, Mapping) or not given:
        return name
    import json

    return f"{name} with {', '.join(f'{key}={json.dumps(value)}' for key, value in given.items())}"


def _spelled_minutes(minutes: float) -> str:
    if minutes < 1:
        return "under a minute"
    if minutes < 90:
        return f"about {round(minutes)} minute{'s'[: round(minutes) > 1]}"
    return f"about {minutes / 60:.1f} hours"


def _run(
    console: Console,
    job: Job,
    record: Record,
    found: Record | None,
    device: str,
    data_root: Path | None,
    folder: Path,
) -> None:
    """Runs the job between a record that says ``started`` and one that says how it ended."""
    import torch

    from mibench.artifacts import ArtifactStore
    from mibench.cli.display import shown
    from mibench.cli.table import print_record
    from mibench.errors import DeviceError
    from mibench.evaluate import evaluate
    from mibench.files import ensure_writable
    from mibench.outputs import remove_leftovers, write_record, write_result

    remove_leftovers(folder)
    store = ArtifactStore()
    ensure_writable(store.root)
    # A finished result stays until the new one is there whole: a failure must not cost it.
    keep = found is not None and found.status == "success"
    if not keep:
        write_record(record, folder)
    try:
        with shown(console):
            result = evaluate(job, store, data_root, device)
        finished = write_result(result, folder)
    except torch.OutOfMemoryError as error:
        failure = DeviceError(
            f"{device} has too little free memory for this run ({str(error).partition('. ')[0]}); "
            "end other programs on it, or use --device cpu"
        )
        _close(record, failure, folder, keep=keep)
        raise failure from error
    except Exception as error:
        _close(record, error, folder, keep=keep)
        raise
    print_record(console, finished)
    alone = f", and each attack alone in {', '.join(result.parts)}" if result.parts else ""
    console.print(
        f"Files: {folder} (record.json, per_image.parquet, grid.png, reconstructions/){alone}",
        soft_wrap=True,
    )


def _close(record: Record, error: Exception, folder: Path, *, keep: bool) -> None:
    """Notes in the record why the run ended."""
    from contextlib import suppress

    from mibench.errors import MibenchError, StorageError
    from mibench.outputs import write_record

    if keep:
        return
    kind = "" if isinstance(error, MibenchError) else f"{type(error).__name__}: "
    text = kind + " ".join(str(error).split())
    with suppress(StorageError):  # what went wrong first matters more
        write_record(record.model_copy(update={"status": "error", "error": text}), folder)
