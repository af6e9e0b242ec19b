"""What to run: one defense against one attack under one protocol with one seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path

from mibench.errors import InvalidParamsError
from mibench.files import Json
from mibench.params import build, merged
from mibench.protocol import Protocol
from mibench.registry import attacks, metrics

UNDEFENDED = "none"
"""Name of the reference that leakage and accuracy are normalised by."""
SUITE = "suite"
"""Stands for all attacks that the protocol names, and the worst of them for each image."""
WEIGHTS_BY_HAND = "trained weights given by hand"
"""First words of the deviation of a job with `Job.weights`."""
EVERY_COALITION = "every coalition attacks, not only the worst by the screening"
"""Deviation of a job with `Job.every_coalition`: a stronger adversary than the protocol's."""


@dataclass(frozen=True)
class Job:
    """What to run: one defense against one attack under one protocol with one seed.

    ``defense_params`` and ``attack_params`` are what the user set; the protocol's own attack
    parameters lie beneath. ``weights`` is the folder of a trained defense to use instead of
    training one; a job with it is never ranked. The attack may be `SUITE`; ``attack_params`` then
    holds parameters by attack. With ``converge``, each attack is made a second time with twice its
    budget, to see whether it had more to gain. With ``every_coalition``, each coalition of the
    protocol's size attacks, and not only the one that the screening finds worst; ``coalition`` is
    one of them, named by its servers.
    """

    protocol: Protocol
    defense: str
    attack: str
    defense_params: Mapping[str, Json]
    attack_params: Mapping[str, Json]
    seed: int = 0
    weights: Path | None = None
    converge: bool = False
    every_coalition: bool = False
    coalition: tuple[int, ...] | None = None

    @property
    def suite(self) -> bool:
        """Whether this stands for all attacks of the protocol."""
        return self.attack == SUITE

    def single(self) -> list[Job]:
        """This job, or for the suite one job for each attack of the protocol.

        Raises:
            InvalidParamsError: the suite of a protocol that names no attack.
        """
        if not self.suite:
            return [self]
        if not self.protocol.attacks:
            raise InvalidParamsError(
                f"protocol {self.protocol.id} names no attacks, so it has no {SUITE}; name one "
                "attack, or list some under 'attacks' in the protocol"
            )
        return [
            replace(self, attack=name, attack_params=self._own_params(name))
            for name in self.protocol.attacks
        ]

    def against(self, coalitions: Sequence[tuple[int, ...]]) -> dict[str, Job]:
        """The single attacks of this job by label; several coalitions have one job each.

        Args:
            coalitions: all of the protocol's size.
        """
        ones = {one.attack: one for one in self.single()}
        if not self.every_coalition or len(coalitions) == 1:
            return ones
        jobs = [
            replace(one, every_coalition=False, coalition=servers)
            for one in ones.values()
            for servers in coalitions
        ]
        return {one.label: one for one in jobs}

    @property
    def label(self) -> str:
        """The attack, and the coalition where one was chosen, such as ``decoder@0+2``."""
        if self.coalition is None:
            return self.attack
        return f"{attacks.load(self.attack).name}@{'+'.join(map(str, self.coalition))}"

    def undefended(self) -> Job:
        """The same attack on the undefended split."""
        return Job(self.protocol, UNDEFENDED, self.attack, {}, self.attack_params, self.seed)

    def budget(self) -> dict[str, int]:
        """The parameters of this single attack that cost it time, by dotted name."""
        method = attacks.load(self.attack)
        params = build(method.Params, self.merged_attack_params(), f"attack {self.attack}")
        return {key: attrgetter(key)(params) for key in method.budget(params)}

    def doubled(self) -> Job:
        """The same single attack with twice its budget."""
        twice = {key: 2 * value for key, value in self.budget().items()}
        params = with_counts(self.attack_params, twice)
        return replace(self, attack_params=params, converge=False)

    def _own_params(self, name: str) -> Mapping[str, Json]:
        given = self.attack_params.get(name, {})
        assert isinstance(given, Mapping), "read from --set NAME.KEY=VALUE"
        return given

    def merged_attack_params(self) -> dict[str, Json]:
        """The protocol's parameters of this attack with the user's on top."""
        return merged(self.protocol.attacks.get(self.built_in, {}), self.attack_params)

    @property
    def built_in(self) -> str:
        """The name that a built-in was registered with, however the user has spelled it."""
        method = attacks.load(self.attack)
        return method.name if method.__module__.startswith("mibench.") else self.attack

    def deviations(self) -> list[str]:
        """How this job departs from its protocol."""
        found = []
        for one in self.single():
            root = one.attack if self.suite else "attack"
            found += [f"{root}.{key} set by hand" for key in sorted(one.attack_params)]
            if one.built_in not in self.protocol.attacks:
                found.append(f"attack {one.attack} is none of the protocol's")
        if self.weights is not None:
            found.append(f"{WEIGHTS_BY_HAND} ({self.weights.resolve().name})")
        if self.every_coalition:
            found.append(EVERY_COALITION)
        if self.coalition is not None:
            servers = "+".join(map(str, self.coalition))
            found.append(f"coalition {servers} chosen by hand, not by the screening")
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


def with_counts(params: Mapping[str, Json], counts: Mapping[str, int]) -> dict[str, Json]:
    """Returns parameters with other counts, which are named with dots."""
    found = dict(params)
    for key, value in counts.items():
        nested: Json = value
        for part in reversed(key.split(".")):
            nested = {part: nested}
        assert isinstance(nested, Mapping)
        found = merged(found, nested)
    return found
