"""The battery for defenses: wiring, behaviour, law, gradients and learning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mibench.checks.base import Finding, Verdict
from mibench.checks.battery import Check, worst
from mibench.checks.confine import Limits
from mibench.checks.defense_behaviour import behaviour
from mibench.checks.defense_gradients import gradients
from mibench.checks.defense_learning import learning
from mibench.checks.defense_wiring import wiring
from mibench.checks.process import LIMIT_CHECKS, TRIED, ComponentError, Nursery
from mibench.checks.trial import SETTINGS, Setting, Trial
from mibench.files import Json
from mibench.registry import defenses

CHECKS: dict[str, Check[Trial]] = {
    **wiring.checks,
    **behaviour.checks,
    **gradients.checks,
    **learning.checks,
}
"""All checks of a defense by name, in order, but for the limits of its processes."""
PRELOAD = ("timm", "torch.utils.flop_counter", "mibench.checks.defense_host")
"""What the processes of defenses need and would import one by one."""
NAMES = (*CHECKS, "raises", *LIMIT_CHECKS)


def check_defense(
    nursery: Nursery,
    name: str,
    params: Mapping[str, Json] | None = None,
    *,
    settings: Sequence[Setting] = SETTINGS,
    only: Sequence[str] | None = None,
    limits: Limits | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Finding]:
    """Tries everything that a defense could get wrong or cheat with.

    Args:
        nursery: starts the processes; the defense is never imported here.
        name: registered name, ``package.module:Class`` or ``./file.py:Class``.
        params: its parameters.
        settings: the classifiers that it is built on; the worst outcome of each check counts.
        only: names of the checks to run; all of them if None.
        limits: of its processes.
        progress: told what is being done.

    Returns:
        One finding for each check, in order.

    Raises:
        MibenchError: there is no such defense, or a parameter is wrong.
    """
    where, readable = located(name)
    declared = _declared(name)
    found: list[tuple[str, Finding]] = []
    for setting in settings:
        trial = Trial(nursery, where, params or {}, setting, limits or Limits(), readable, declared)
        try:
            for one in _tried(trial, only, progress):
                found.append((setting.title if len(settings) > 1 else "", one))
        finally:
            trial.close()
        if any(one.check.startswith("limit-") for _, one in found):
            break
    kept = worst(found)
    done = {one.check for one in kept}
    for check in LIMIT_CHECKS:
        if check not in done and (only is None or check in only):
            words = "it kept within its limits"
            kept.append(Finding(check, Verdict.PASSED, TRIED[check], words))
    return kept


def _tried(
    trial: Trial, only: Sequence[str] | None, progress: Callable[[str], None]
) -> Iterator[Finding]:
    title = trial.setting.title
    try:
        progress(f"{title}: building")
        assert trial.trainer
        if trial.misfit is not None:
            yield Finding(
                "builds", Verdict.SKIPPED, "built the defense on this backbone", trial.misfit
            )
            return
        for check in CHECKS.values():
            if only is not None and check.name not in only:
                continue
            progress(f"{title}: {check.name}")
            try:
                yield check.finding(trial)
            except ComponentError as error:
                if error.finding.check != "raises":
                    raise
                yield error.finding
        if only is not None and not set(only) & set(CHECKS):
            # The limits are judged while the defense does what it is for.
            progress(f"{title}: sending")
            trial.logits(trial.send(trial.some))
    except ComponentError as error:
        yield error.finding
    for process in trial.processes:
        yield from process.findings


def located(name: str) -> tuple[str, tuple[Path, ...]]:
    """Returns a component's name with an absolute path, and the folders that it may read."""
    where, colon, cls = name.rpartition(":")
    if not colon or not where.endswith(".py"):
        return name, ()
    path = Path(where).expanduser().resolve()
    return f"{path}:{cls}", (path.parent,)


def _declared(name: str) -> str | None:
    if name not in defenses:
        return None
    stated = defenses.entry(name).facts.get("randomness")
    return None if stated is None else str(stated)
