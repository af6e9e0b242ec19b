"""Runs a submission under its protocols, in the sandbox."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from pydantic import JsonValue

from mibench.artifacts import open_artifact
from mibench.deployment import hash_tensors
from mibench.errors import MibenchError, SubmissionError
from mibench.files import canonical_json, content_id, ensure_writable, plain_name
from mibench.job import SUITE
from mibench.outputs import WEIGHTS
from mibench.protocol import load_protocol
from mibench.record import Record, read_record
from mibench.submission import sandbox
from mibench.submission.schema import Submission
from mibench.submission.static import load

RUNS = Path("runs/submissions")

Chosen: TypeAlias = tuple[str, Mapping[str, JsonValue]]
"""Name or place of a component, and its parameters."""


@dataclass(frozen=True)
class Turn:
    """One run of a submission.

    Attributes:
        key: a path below the folder of all runs.
        protocol: id.
        seed: of the run.
        defense: name or place, and its parameters.
        attack: name or place, or the suite; and its parameters.
    """

    key: str
    protocol: str
    seed: int
    defense: Chosen
    attack: Chosen

    def words(self) -> list[str]:
        """Arguments of ``mibench`` that make this run, without folder, device and images."""
        words = ["run", "--protocol", self.protocol, "--seed", str(self.seed)]
        for kind, (name, params) in (("defense", self.defense), ("attack", self.attack)):
            words += [f"--{kind}", name]
            for key, value in params.items():
                words += ["--set", f"{kind}.{key}={canonical_json(value).decode()}"]
        return words


def turns(folder: Path, submission: Submission, attack: str | None = None) -> list[Turn]:
    """Returns the runs of a submission: each protocol, each seed, each target of an attack.

    Args:
        folder: of the submission.
        submission: what it says.
        attack: for a defense, one attack instead of the suite.
    """
    own: Chosen = (place(folder, submission), submission.params)
    pairs: list[tuple[Chosen, Chosen, str]]
    if submission.kind == "defense":
        met = attack or SUITE
        pairs = [(own, (met, {}), met)]
    else:
        pairs = [
            ((one.name, one.params), own, plain_name(one.name) + _short(one.params))
            for one in submission.entrants
        ]
    return [
        Turn(
            f"{plain_name(load_protocol(protocol).id)}/{plain_name(title)}-s{seed}",
            protocol,
            seed,
            defense,
            met,
        )
        for protocol in submission.protocols
        for seed in submission.seeds
        for defense, met, title in pairs
    ]


def place(folder: Path, submission: Submission) -> str:
    """Returns how the component is named in commands and records: ``submissions/NAME/FILE:CLASS``.

    It is seen from the folder above ``submissions``, and the same on every machine.
    """
    if submission.file is None:
        return submission.component
    whole = folder.resolve()
    return f"{whole.parent.name}/{whole.name}/{submission.component}"


def score(
    folder: Path,
    out: Path,
    data_root: Path | None,
    *,
    attack: str | None = None,
    protocol: str | None = None,
    device: str = "cpu",
    seconds: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> list[Path]:
    """Makes every run of a submission that is not there yet.

    Args:
        folder: of the submission.
        out: folder of all its runs.
        data_root: datasets in the hub's layout; needed for all but generated images.
        attack: for a defense, one attack instead of the suite.
        protocol: one of the submission's protocols instead of all.
        device: a PyTorch device.
        seconds: time for one run, if other than `sandbox.LIMITS` has it.
        say: told what happens.

    Returns:
        The folders of the runs, finished ones included. Each holds what `mibench run` writes, and
        in `WEIGHTS` the trained defense.

    Raises:
        SubmissionError: something is wrong with the folder, or a run failed or was stopped.
        MibenchError: images are missing, or nothing can be written.
    """
    submission = load(folder)
    if protocol is not None and protocol not in submission.protocols:
        msg = (
            f"{protocol!r} is none of the protocols in {folder / 'submission.yaml'}: "
            f"{', '.join(submission.protocols)}"
        )
        raise SubmissionError([msg])
    chosen = [
        turn for turn in turns(folder, submission, attack) if protocol in (None, turn.protocol)
    ]
    for needed in {turn.protocol: None for turn in chosen}:
        refuse_missing_images(needed, data_root)
    made = []
    for one in chosen:
        target = out / one.key
        made.append(target)
        if _is_done(target, one):
            say(f"{target}: there already")
            continue
        say(f"{target}: begins")
        ensure_writable(target)
        words = [*one.words(), "--device", device, "--out", str(target.resolve())]
        run_confined(words, target, folder, data_root, f"the run {one.key}", seconds, say)
        keep_weights(target, read_record(target))
        sandbox.drop_cache(target)
    return made


def run_confined(
    words: Sequence[str],
    target: Path,
    folder: Path,
    data_root: Path | None,
    what: str,
    seconds: float | None,
    say: Callable[[str], None],
    *,
    readable: Sequence[Path] = (),
    fine: Sequence[int] = (0,),
) -> sandbox.Done:
    """Runs a command of mibench on a submission's code.

    Raises:
        SubmissionError: it failed, was stopped, or tried what no component may.
    """
    limits = sandbox.LIMITS
    if seconds is not None:
        limits = type(limits)(**{**limits.described(), "seconds": seconds})
    images = [] if data_root is None else [data_root]
    words = [*words, *(["--data-root", str(data_root.resolve())] if data_root else [])]
    done = sandbox.carry_out(
        words, target, folder, readable=[*images, *readable], limits=limits, say=say
    )
    say(f"In the sandbox, {sandbox.walls(done.confined)}.")
    done.refuse_failure(what, fine=fine)
    return done


def refuse_missing_images(protocol: str, data_root: Path | None) -> None:
    """Refuses a protocol whose images would have to be downloaded: the sandbox has no network.

    Raises:
        SubmissionError: there is no folder of images.
    """
    dataset = load_protocol(protocol).data.dataset
    if dataset != "procedural" and (data_root is None or not data_root.is_dir()):
        words = (
            f"{protocol} needs the images of {dataset}, and the sandbox has no network: give a "
            "folder with them, --data-root FOLDER (see docs/datasets.md)"
        )
        raise SubmissionError([words])


def keep_weights(run: Path, record: Record) -> None:
    """Copies the trained defense out of the run's cache, checked against the record.

    Raises:
        SubmissionError: it is not there, or not what the record says.
    """
    key = str(record.defense_facts.get("artifact"))
    source = run / "cache" / "defense" / plain_name(key)
    try:
        artifact, _ = open_artifact(source)
    except MibenchError as error:
        raise SubmissionError([f"{run}: the trained defense is not there: {error}"]) from error
    if hash_tensors(artifact.tensors) != record.defense_facts.get("trained_weights"):
        raise SubmissionError([f"{run}: the trained defense is not the one that the record names"])
    shutil.copytree(source, run / WEIGHTS, dirs_exist_ok=True)


def _is_done(target: Path, turn: Turn) -> bool:
    if not (target / "record.json").is_file():
        return False
    record = read_record(target)
    if record.status != "success":
        return False
    if not (target / WEIGHTS).is_dir():
        raise SubmissionError([f"{target} was not made by this command; choose another --out"])
    if (record.seed, record.protocol.id) != (turn.seed, load_protocol(turn.protocol).id):
        raise SubmissionError([f"{target} holds another run; choose another --out"])
    return True


def _short(params: Mapping[str, JsonValue]) -> str:
    return f"-{content_id(params, length=8)}" if params else ""
