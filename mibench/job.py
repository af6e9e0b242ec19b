"""What to run: one defense against one attack under one protocol with one seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mibench.files import Json
from mibench.protocol import Protocol
from mibench.registry import attacks, metrics

UNDEFENDED = "none"
"""Name of the reference that leakage and accuracy are normalised by."""


@dataclass(frozen=True)
class Job:
    """What to run: one defense against one attack under one protocol with one seed.

    ``defense_params`` and ``attack_params`` are what the user set; the protocol's own attack
    parameters lie beneath. ``weights`` is the folder of a trained defense to use instead of
    training one; a job with it is never ranked.
    """

    protocol: Protocol
    defense: str
    attack: str
    defense_params: Mapping[str, Json]
    attack_params: Mapping[str, Json]
    seed: int = 0
    weights: Path | None = None

    def undefended(self) -> Job:
        """The same attack on the undefended split."""
        return Job(self.protocol, UNDEFENDED, self.attack, {}, self.attack_params, self.seed)

    def merged_attack_params(self) -> dict[str, Json]:
        """The protocol's parameters of this attack with the user's on top."""
        return _merge(self.protocol.attacks.get(self._attack_name, {}), self.attack_params)

    @property
    def _attack_name(self) -> str:
        """The name that a built-in was registered with, however the user has spelled it."""
        method = attacks.load(self.attack)
        return method.name if method.__module__.startswith("mibench.") else self.attack

    def deviations(self) -> list[str]:
        """How this job departs from its protocol."""
        found = [f"attack.{key} set by hand" for key in sorted(self.attack_params)]
        if self.weights is not None:
            found.append(f"trained weights given by hand ({self.weights.resolve().name})")
        if self._attack_name not in self.protocol.attacks:
            found.append(f"attack {self.attack} is none of the protocol's")
        found += [
            f"{key} differs from the released {self.protocol.id}" for key in self.protocol.changes
        ]
        for name, version in self.protocol.metrics.items():
            installed = metrics.load(name).version
            if installed != version:
                found.append(f"metric {name} is version {installed}, not {version}")
        if self.seed not in self.protocol.seeds:
            found.append(f"seed {self.seed} is none of the protocol's {list(self.protocol.seeds)}")
        return found


def _merge(below: Mapping[str, Json], above: Mapping[str, Json]) -> dict[str, Json]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        both = isinstance(under, Mapping) and isinstance(value, Mapping)
        merged[key] = _merge(under, value) if both else value  # type: ignore[arg-type]
    return merged
