"""A grid of runs: which defenses meet which attacks under which protocols and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, JsonValue, model_validator

from mibench.errors import InvalidParamsError, MibenchError
from mibench.files import canonical_json, content_id, plain_name
from mibench.job import Job
from mibench.params import Parameters, build, parse_yaml
from mibench.protocol import load_protocol


class Entrant(Parameters):
    """A defense with parameters; each list under ``each`` makes one run of every value.

    Attributes:
        name: as in ``mibench run --defense``.
        set: parameters that differ from the defaults.
        each: by parameter, the values to try; with several, every combination.
    """

    name: str
    set: dict[str, JsonValue] = Field(default_factory=dict)
    each: dict[str, list[JsonValue]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _apart(self) -> Entrant:
        both = sorted(set(self.set) & set(self.each))
        if both:
            raise ValueError(f"{', '.join(both)} stands under both 'set' and 'each'")
        if any(not values for values in self.each.values()):
            raise ValueError("a list under 'each' is empty")
        return self

    def variants(self) -> list[dict[str, JsonValue]]:
        """Returns the parameters of each run."""
        combined = itertools.product(*self.each.values())
        return [{**self.set, **dict(zip(self.each, one, strict=True))} for one in combined]


class Grid(Parameters):
    """All of a grid file.

    Attributes:
        protocols: ids, or paths that end in ``.yaml``.
        defenses: names, or mappings with ``name``, ``set`` and ``each``.
        attacks: names, or ``suite``.
        seeds: null for the seeds of each protocol.
        converge: as ``mibench run --converge``.
    """

    protocols: tuple[str, ...] = Field(min_length=1)
    defenses: tuple[str | Entrant, ...] = Field(min_length=1)
    attacks: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] | None = Field(default=None, min_length=1)
    converge: bool = False

    def cells(self) -> list[Cell]:
        """Returns every run once: first seeds first, then in the order of the file.

        Raises:
            MibenchError: a protocol cannot be read.
        """
        protocols = {name: load_protocol(name) for name in self.protocols}
        own = {name: self.seeds or protocol.seeds for name, protocol in protocols.items()}
        found: dict[str, Cell] = {}
        for turn in range(max(map(len, own.values()))):
            for name, one, attack in itertools.product(own, self.defenses, self.attacks):
                if turn >= len(own[name]):
                    continue
                entrant = one if isinstance(one, Entrant) else Entrant(name=one)
                for params in entrant.variants():
                    job = Job(
                        protocols[name],
                        entrant.name,
                        attack,
                        params,
                        {},
                        own[name][turn],
                        converge=self.converge,
                    )
                    cell = Cell(name, job)
                    found.setdefault(cell.key, cell)
        return list(found.values())


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        protocol: as the grid names it.
        job: what to run.
    """

    protocol: str
    job: Job

    @property
    def key(self) -> str:
        """A path below the sweep's folder, different for every run."""
        job = self.job
        names = [plain_name(job.defense)]
        if job.defense_params:
            names.append(content_id(job.defense_params, length=8))
        leaf = "-".join([*names, plain_name(job.attack), f"s{job.seed}"])
        return f"{plain_name(job.protocol.id)}/{leaf}"

    @property
    def trains(self) -> tuple[str, str, bytes, int]:
        """What tells the defense that it trains first from others."""
        job = self.job
        return self.protocol, job.defense, canonical_json(job.defense_params), job.seed

    def words(self) -> list[str]:
        """Returns the arguments of ``mibench run`` that make this run, without its folder."""
        job = self.job
        words = ["--protocol", self.protocol, "--defense", job.defense, "--attack", job.attack]
        words += ["--seed", str(job.seed)]
        for key, value in job.defense_params.items():
            words += ["--set", f"defense.{key}={canonical_json(value).decode()}"]
        return [*words, "--converge"] if job.converge else words


def load_grid(path: Path) -> Grid:
    """Reads a grid file.

    Raises:
        InvalidParamsError: there is no such file, it is not YAML, or a key or value is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidParamsError(f"no grid file {path}; check the path") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParamsError(f"{path} is not a readable text file") from error
    values = parse_yaml(text, f"grid {path}")
    if not isinstance(values, Mapping):
        raise InvalidParamsError(f"grid {path} must be a mapping of keys to values")
    return build(Grid, values, f"grid {path}")


def problems(cells: list[Cell], device: str) -> list[str]:
    """Returns what is wrong with names and parameters, all at once, each only once.

    Args:
        cells: of a grid.
        device: a PyTorch device.
    """
    from mibench.evaluate import open_record  # imports PyTorch

    found: dict[str, None] = {}
    for cell in cells:
        try:
            open_record(cell.job, device)
        except MibenchError as error:
            found[" ".join(str(error).split())] = None
    return list(found)
