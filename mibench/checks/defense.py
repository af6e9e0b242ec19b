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
from mibench.checks.process import LIMIT_CHECKS, ComponentError, Nursery, kept_within
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
PRELOAD = ("timm", "mibench.checks.defense_host", "mibench.backbones.small_resnet")
"""What the processes of defenses need and would import one by one."""
RUNS, RUNS_TRIED = "runs", "built, trained and used the defense on this backbone"
NAMES = (RUNS, *CHECKS, *LIMIT_CHECKS)


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
            title = setting.title if len(settings) > 1 else ""
            found.extend((title, one) for one in _tried(trial, only, progress))
        finally:
            trial.close()
        if any(one.check.startswith("limit-") for _, one in found):
            break
    kept = _runs_somewhere(worst(found), found)
    return [*kept, *kept_within(kept, only)]


def _tried(
    trial: Trial, only: Sequence[str] | None, progress: Callable[[str], None]
) -> Iterator[Finding]:
    title = trial.setting.title
    try:
        progress(f"{title}: training")
        misfit = _misfit(trial)
        if misfit is not None:
            yield Finding(RUNS, Verdict.SKIPPED, RUNS_TRIED, misfit)
            return
        for check in CHECKS.values():
            if only is None or check.name in only:
                progress(f"{title}: {check.name}")
                yield _judged(check, trial)
        if only is not None and not set(only) & set(CHECKS):
            # The limits are judged while the defense does what it is for.
            progress(f"{title}: sending")
            trial.logits(trial.send(trial.some))
        yield Finding(RUNS, Verdict.PASSED, RUNS_TRIED, "it trains, sends and answers")
    except ComponentError as error:
        yield error.finding
    for process in trial.processes:
        yield from process.findings


def _runs_somewhere(kept: list[Finding], found: list[tuple[str, Finding]]) -> list[Finding]:
    """Says on which backbones it runs; a defense that runs on none has failed."""
    ran = [title for title, one in found if one.check == RUNS and one.verdict is Verdict.PASSED]
    why = [
        f"{title}: {one.found}".removeprefix(": ")
        for title, one in found
        if one.check == RUNS and one.verdict is Verdict.SKIPPED
    ]
    if not why:
        return kept
    others = [one for one in kept if one.check != RUNS]
    advice = "take the shape of the features from split.feature_shape: maps or tokens"
    if not ran and not others:
        words = "; ".join(why)
        return [Finding(RUNS, Verdict.FAILED, RUNS_TRIED, words, advice)]
    words = f"not on {'; '.join(why)}"
    return [Finding(RUNS, Verdict.WARNED, RUNS_TRIED, words, advice), *others]


def _misfit(trial: Trial) -> str | None:
    """Why the defense cannot be used on this backbone at all: it refuses, or it raises."""
    try:
        assert trial.trainer
        if trial.misfit is None:
            trial.trainer.ask("defense.answer", {"images": trial.some})
            assert trial.trained
    except ComponentError as error:
        if error.finding.check != "raises":
            raise
        return error.finding.found
    return trial.misfit


def _judged(check: Check[Trial], trial: Trial) -> Finding:
    try:
        return check.finding(trial)
    except ComponentError as error:
        if error.finding.check != "raises":
            raise
        found = error.finding.found
    except (RuntimeError, ValueError, LookupError, TypeError, ArithmeticError) as error:
        # Tensors of a shape, type or size that no defense of this contract answers with.
        found = f"what it answered cannot be judged: {' '.join(str(error).split())[:200]}"
    return Finding(check.name, Verdict.FAILED, check.tried, found, check.advice)


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
