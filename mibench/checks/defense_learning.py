"""Checks that a defense learns what it says, within the steps that the recipe allows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mibench.checks.battery import Battery, Outcome, failed, passed, warned
from mibench.checks.defense_wiring import deviating, most_deviating
from mibench.checks.trial import LEARNING, Trial

learning: Battery[Trial] = Battery()

TINY = 1e-12
"""Gradient below which a loss term does not reach a parameter."""
BATCH = 32
LOOKED = 100
"""Steps of the training at whose moments loss terms are looked at."""


@learning.check(
    "learns",
    tried="trained for some steps and compared every parameter with what it was",
    advice="let every parameter take part in the loss; what is fixed on purpose is a buffer",
)
def learns(trial: Trial) -> Outcome:
    """Every parameter that is used moves."""
    parameters = {one["name"]: one for one in trial.facts["parameters"]}
    idle = []
    for name in trial.trained["still"]:
        one: dict[str, Any] = parameters.get(name, {"learns": True, "own": True})
        if not _used(trial, name):
            idle.append(f"{name} is used by nothing")
        elif one["learns"] or one["own"]:
            return failed(f"{name} is used and never moves")
        else:
            idle.append(f"{name} of the backbone is frozen")
    if idle:
        return warned("; ".join(idle[:3]) + ("; ..." if len(idle) > 3 else ""))
    return passed(f"all {len(parameters)} parameters move")


def _used(trial: Trial, name: str) -> bool:
    """Whether messages or answers change with a parameter."""
    stream: tuple[int, str] = (trial.seed, "used")
    changed = {**trial.weights}
    value = changed[name]
    changed[name] = value + 0.5 * value.abs().mean().clamp_min(0.1)
    process = trial.stand_in("changed")

    def look() -> tuple[tuple[Tensor, ...], Tensor]:
        images = {"images": trial.some}
        sent = trial.send(trial.some, *stream, process=process)
        return sent, process.ask("defense.answer", images, ambient=stream)[1]["logits"]

    before = look()
    process.ask("defense.load", changed)
    after = look()
    process.close()
    return most_deviating(before[0], after[0]) > 0 or deviating(before[1], after[1]) > 0


@learning.check(
    "loss-reaches-client",
    tried="took the gradient of every loss term in the client's parameters, phase by phase",
    advice="do not detach what the client computes in front of a term that shall protect it",
)
def loss_reaches_client(trial: Trial) -> Outcome:
    """Every loss term has a gradient in some parameter of the client, at some moment."""
    process = trial.start("terms")
    told, _ = process.ask(
        "defense.terms",
        trial.train,
        seconds=LEARNING,
        steps=LOOKED,
        batch=BATCH,
        seed=trial.seed,
    )
    process.close()
    reached: dict[str, float] = {}
    for one in told["terms"]:
        if one["open"]:
            term = str(one["term"])
            reached[term] = max(reached.get(term, 0.0), float(one["client"]))
    values = {str(one["term"]): 0.0 for one in told["terms"]}
    for one in told["terms"]:
        values[str(one["term"])] += abs(float(one["value"]))
    lost = [term for term, size in reached.items() if not size > TINY]
    if lost and all(values[term] == 0 for term in lost):
        # As a hinge has it where its margin is kept.
        return warned(f"{', '.join(lost)} is 0 whenever it was looked at, so nothing can be told")
    if lost:
        return failed(f"no gradient of {', '.join(lost)} in any parameter of the client")
    sizes = ", ".join(f"{term} {size:.2g}" for term, size in reached.items())
    return passed(f"largest gradients in the client: {sizes}")


@learning.check(
    "training-budget",
    tried="counted the steps of all optimisers and the backward passes in fit()",
    advice="leave the training to the recipe; the best of several trainings is no single one",
)
def training_budget(trial: Trial) -> Outcome:
    """No more steps than the recipe has."""
    told, steps = trial.trained, int(trial.recipe["steps"])  # type: ignore[arg-type]
    words = f"{told['steps']} steps and {told['backwards']} backward passes for {steps} allowed"
    if told["steps"] > steps or told["backwards"] > 2 * steps:
        return failed(words)
    if trial.facts["own_fit"]:
        return warned(f"it has a fit() of its own: {words}")
    return passed(words)
