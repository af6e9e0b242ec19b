"""Cards: what a defense claims, how it is run here, and what was measured, one file for each.

Attacks have cards too, in ``baselines/attacks``: what each knows, learns, chooses and costs.
``python -m mibench.cards RUN...`` puts the records of finished runs into ``baselines/*/card.yaml``
and writes ``baselines/README.md`` from the cards. Run it from the root of the repository. Runs that
depart from their protocol are left out, except by a client above its budget.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import Field, JsonValue

from mibench.errors import InvalidParamsError, MibenchError
from mibench.evaluate import OVER_BUDGET
from mibench.files import write_atomically
from mibench.job import SUITE
from mibench.params import Parameters, build, parse_yaml
from mibench.record import Record, Score, read_record
from mibench.registry import defenses
from mibench.threat import Knowledge

C = TypeVar("C", bound=Parameters)
MEASURED = "measured:"
"""First words of a card's last part, the one that is written by this module."""
ATTACKS = ("decoder", "gradient-warm")
"""Attacks that every defense meets; before it has, its worst leakage is not told."""
VARIANTS_MEET = "decoder"
"""The attack that every variant of a defense meets, so that a curve costs one attack per point."""


class Paper(Parameters):
    """Where a method was published."""

    title: str
    authors: str
    venue: str
    arxiv: str | None = Field(default=None, pattern=r"^\d{4}\.\d{4,5}$")
    code: str | None = None


class Claim(Parameters):
    """What the paper says of its method, and where it says so."""

    text: str
    source: str


class Families(Parameters):
    """Whether the defense works on maps (ResNets) and on tokens (vision transformers), and how."""

    maps: str
    tokens: str


class Setting(Parameters):
    """Parameters under one protocol that differ from the defaults, and why."""

    protocol: str
    values: dict[str, JsonValue]
    why: str


class Strength(Parameters):
    """The parameter that trades accuracy for leakage, and values from weak to strong."""

    parameter: str
    values: tuple[float, ...] = Field(min_length=2)


class Interval(Parameters):
    """A score with its 95 % interval over images."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


class Measurement(Parameters):
    """One run, from its record.

    Attributes:
        protocol: its id.
        content: hash of the protocol's content.
        attack: who attacked.
        params: parameters of the defense that differ from the defaults.
        seed: of the run.
        images: number of attacked images.
        code: hash of the defense's code.
        ranked: whether the client stays within the protocol's budget.
        accuracy: of the defended model on all private images.
        undefended_accuracy: of the model without a defense.
        psnr: of the reconstructions, dB.
        ssim: of the reconstructions.
        floor_psnr: of the best blind guess.
        floor_ssim: of the best blind guess.
        leakage: normalised leakage in SSIM; null where the record has none.
        seconds_per_image: that the reconstruction took, what came before it left out.
        client_flops: two for each multiply-add, of protection and fusion.
        client_parameters: of what runs on the client.
        bytes_up: sent for one image.
        facts: plain values that the defense reported of itself.
    """

    protocol: str
    content: str
    attack: str
    params: dict[str, JsonValue]
    seed: int
    images: int
    code: str
    ranked: bool
    accuracy: float
    undefended_accuracy: float
    psnr: Interval
    ssim: Interval
    floor_psnr: float
    floor_ssim: float
    leakage: Interval | None
    seconds_per_image: float | None = None
    client_flops: int
    client_parameters: int
    bytes_up: int
    facts: dict[str, JsonValue] = Field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells one measurement from another; a newer one takes its place."""
        return self.protocol, str(sorted(self.params.items())), self.attack, self.seed


class Card(Parameters):
    """All of a ``card.yaml``."""

    name: str
    title: str
    paper: Paper | None
    idea: str
    claims: tuple[Claim, ...]
    families: Families
    parameters: tuple[Setting, ...]
    strength: Strength | None
    differences: tuple[str, ...]
    measured: tuple[Measurement, ...]


class AttackCard(Parameters):
    """All of ``attacks/<name>.yaml``.

    Attributes:
        name: as registered.
        paper: where it was published, if it was.
        idea: in a sentence or two.
        knowledge: the least that it needs.
        learns: what it trains, and on what.
        chooses: what it tunes, and on what.
        cost: what it takes in training and per image.
        differences: from the paper or its code, with the reason.
    """

    name: str
    paper: Paper | None
    idea: str
    knowledge: Knowledge
    learns: str
    chooses: str
    cost: str
    differences: tuple[str, ...]


def load_card(path: Path) -> Card:
    """Reads the card of a defense.

    Raises:
        InvalidParamsError: it is not YAML, or a key or value is wrong.
    """
    return _loaded(Card, path)


def load_attack_card(path: Path) -> AttackCard:
    """Reads the card of an attack.

    Raises:
        InvalidParamsError: it is not YAML, or a key or value is wrong.
    """
    return _loaded(AttackCard, path)


def _loaded(kind: type[C], path: Path) -> C:
    values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise InvalidParamsError(f"{path} must be a mapping of keys to values")
    return build(kind, values, str(path))


def measurement(record: Record) -> Measurement:
    """Returns what a card keeps of a successful record."""
    assert record.cost is not None, "checked by _refuse_unfit"
    assert record.data is not None, "checked by _refuse_unfit"
    defaults = _defaults(record.defense.name)
    given = record.defense.params
    return Measurement(
        protocol=record.protocol.id,
        content=record.protocol.content,
        attack=record.attack.name,
        params={k: v for k, v in given.items() if k not in defaults or defaults[k] != v},
        seed=record.seed,
        images=record.data.images["attacked"],
        code=record.defense.code,
        ranked=record.protocol.ranked,
        accuracy=_value(record.utility, "accuracy"),
        undefended_accuracy=_value(record.utility, "undefended accuracy"),
        psnr=_interval(record.scores, "psnr"),
        ssim=_interval(record.scores, "ssim"),
        floor_psnr=_value(record.prior_only, "psnr"),
        floor_ssim=_value(record.prior_only, "ssim"),
        leakage=_interval_or_none(record.leakage, "leakage(ssim)"),
        seconds_per_image=_rounded(record.seconds_per_image),
        client_flops=record.cost.client_flops,
        client_parameters=record.cost.client_parameters,
        bytes_up=record.cost.bytes_up,
        facts={k: v for k, v in record.defense_facts.items() if _is_plain(k, v)},
    )


def collect(folder: Path, records: Sequence[Record]) -> list[Path]:
    """Puts measurements into the cards of a folder; a newer one of the same run replaces the old.

    So it does with all that a card holds of the same protocol with another content.

    Args:
        folder: holds ``<name>/card.yaml``.
        records: of runs; those of defenses without a card are left out.

    Returns:
        The cards that were written.

    Raises:
        InvalidParamsError: a run did not succeed, departs from its protocol, or has no such scores.
    """
    for record in records:
        _refuse_unfit(record)
    written = []
    for path in sorted(folder.glob("*/card.yaml")):
        card = load_card(path)
        own = [record for record in records if record.defense.name == card.name]
        if not own:
            continue
        new = list(map(measurement, own))
        current = {row.protocol: row.content for row in new}
        # What was measured under another content of a protocol cannot stand beside it.
        kept = [
            row for row in card.measured if current.get(row.protocol, row.content) == row.content
        ]
        rows = {row.key: row for row in [*kept, *new]}
        text = path.read_text(encoding="utf-8")
        head = text[: text.index(f"\n{MEASURED}") + 1]
        dumped = [rows[key].model_dump(mode="json") for key in sorted(rows)]
        tail = yaml.safe_dump({"measured": dumped}, sort_keys=False, default_flow_style=None)
        write_atomically(path, (head + tail).encode())
        written.append(path)
    return written


def _refuse_unfit(record: Record) -> None:
    what = f"the run of {record.defense.name} against {record.attack.name}"
    if record.status != "success":
        raise InvalidParamsError(f"{what} has not succeeded; its status is {record.status}")
    departing = [one for one in record.deviations if not one.startswith(OVER_BUDGET)]
    if departing:
        raise InvalidParamsError(f"{what} departs from its protocol: {'; '.join(departing)}")
    if record.cost is None or record.data is None:
        raise InvalidParamsError(f"{what} was recorded by an older version; run it again")


def page(cards: Sequence[Card], attack_cards: Sequence[AttackCard] = ()) -> str:
    """Returns ``baselines/README.md``: what each card says, and the tables of each protocol."""
    lines = [
        "# Baselines",
        "",
        "One folder for each built-in defense, with a card: its paper, what that claims, the",
        "parameters used here, what was measured, and where this implementation differs. This page",
        "is written from the cards by `python -m mibench.cards`.",
        "",
        "Ranks, recognition and pictures are on the [leaderboard](../docs/leaderboard.md). What",
        "was measured here is older: on another machine, one seed, before images were scored in 8",
        "bits. Above 40 dB, values are now 0.1 to 0.4 dB lower.",
        "",
    ]
    rows = []
    for card in cards:
        knob = f"`{card.strength.parameter}`" if card.strength else "-"
        link = f"[`{card.name}`]({card.name}/card.yaml)"
        rows.append([link, _cited(card.paper), card.families.maps, card.families.tokens, knob])
    lines += _markdown(["defense", "paper", "maps", "tokens", "strength"], rows)
    if attack_cards:
        lines += ["", *_markdown(["attack", "paper", "knowledge", "learns", "cost"], [
            [f"[`{one.name}`](attacks/{one.name}.yaml)", _cited(one.paper), one.knowledge.value,
             one.learns, one.cost]
            for one in attack_cards
        ])]  # fmt: skip
    for protocol, content in sorted({(r.protocol, r.content) for c in cards for r in c.measured}):
        measured = [(c, row) for c in cards for row in c.measured if row.content == content]
        lines += ["", f"## {protocol}", "", *_defaults_table(measured)]
        if any(row.attack not in ATTACKS for _, row in measured):
            lines += ["", "### Attacks", "", *_attacks_table(measured)]
        if any(row.params for _, row in measured):
            lines += ["", "### Strengths and variants", "", *_variants_table(measured)]
    return "\n".join(lines) + "\n"


def _cited(paper: Paper | None) -> str:
    return "-" if paper is None else f"{paper.authors}, {paper.venue}"


def _defaults_table(measured: Sequence[tuple[Card, Measurement]]) -> list[str]:
    """The defenses with their default parameters, against the attacks that every one meets."""
    runs: dict[tuple[str, int], dict[str, Measurement]] = {}
    for card, row in measured:
        if not row.params:
            runs.setdefault((card.name, row.seed), {})[row.attack] = row
    some = measured[0][1]
    floors = sorted({f"{row.floor_psnr:.1f} dB / {row.floor_ssim:.2f}" for _, row in measured})
    heads = ["defense", "accuracy", *(f"{attack}: PSNR / SSIM" for attack in ATTACKS)]
    heads += ["worst leakage (SSIM)", "client MFLOPs", "KB sent"]
    rows = []
    for (name, _), found in sorted(runs.items(), key=_order):
        first = next(iter(found.values()))
        cells = [f"`{name}`{_marks(first)}", f"{100 * first.accuracy:.1f} %"]
        scores = (found.get(attack) for attack in ATTACKS)
        cells += [f"{one.psnr.value:.1f} / {one.ssim}" if one else "-" for one in scores]
        worst = _worst(found)
        cells.append("" if worst is None else f"{worst:.2f}")
        cells += [f"{first.client_flops / 1e6:.2f}", f"{first.bytes_up / 1024:.1f}"]
        rows.append(cells)
    return [
        f"Content `{some.content}`; {some.images} images attacked; floor (best blind guess,",
        f"PSNR / SSIM): {', '.join(floors)}; {100 * some.undefended_accuracy:.1f} % undefended.",
        "Sorted by worst leakage, which is that of the strongest of these attacks: 0 is a blind",
        "guess, 1 the undefended split; empty where one has not been run. In brackets: 95 %",
        "intervals over images. A star: the client is over the protocol's budget; not ranked.",
        "",
        *_markdown(heads, rows),
    ]


def _attacks_table(measured: Sequence[tuple[Card, Measurement]]) -> list[str]:
    """Every attack, against the defenses that have met the most of them."""
    plain = [(card.name, row) for card, row in measured if not row.params and not row.seed]
    met = {name: {row.attack: row for owner, row in plain if owner == name} for name, _ in plain}
    most = max(map(len, met.values()))
    met = {name: found for name, found in met.items() if len(found) == most}
    attacks = set.intersection(*map(set, met.values()))
    rows = []
    for attack in sorted(attacks, key=lambda one: (one == SUITE, one)):
        cells = [f"`{attack}`"]
        for found in met.values():
            row = found[attack]
            leakage = "-" if row.leakage is None else f"{row.leakage.value:.2f}"
            cells.append(f"{row.psnr.value:.1f} / {row.ssim.value:.2f} / {leakage}")
        spent = [found[attack].seconds_per_image for found in met.values()]
        known = [one for one in spent if one is not None]
        cells.append("-" if len(known) < len(spent) else f"{min(known):.2g} to {max(known):.2g}")
        rows.append(cells)
    return [
        "PSNR / SSIM / leakage (SSIM). Leakage compares with the same attack on the undefended",
        f"split; `{SUITE}` takes the worst of all attacks for each image. Seconds are those of the",
        "reconstruction, without what was trained before it.",
        "",
        *_markdown(["attack", *(f"`{name}`" for name in met), "seconds per image"], rows),
    ]


def _variants_table(measured: Sequence[tuple[Card, Measurement]]) -> list[str]:
    """Every parameter set of the defenses that were run with more than one, weak ones first."""
    varied = {card.name for card, row in measured if row.params}
    met = [one for one in measured if one[0].name in varied and one[1].attack == VARIANTS_MEET]
    rows = []
    for card, row in sorted(met, key=lambda one: (one[0].name, *_from_weak_to_strong(*one))):
        knob = card.strength.parameter if card.strength else None
        plain = {knob: _defaults(card.name)[knob]} if knob else {}
        label = f"`{card.name}` {_spelled(row.params or plain)}"
        label += ("" if row.params else " (default)") + _marks(row)
        cells = [label, f"{100 * row.accuracy:.1f} %", f"{row.psnr.value:.1f}", str(row.ssim)]
        rows.append([*cells, "-" if row.leakage is None else str(row.leakage)])
    heads = ["defense", "accuracy", "PSNR, dB", "SSIM", "leakage (SSIM)"]
    return [
        f"Other parameters, met by the `{VARIANTS_MEET}` attack, from weak to strong.",
        "",
        *_markdown(heads, rows),
    ]


def _from_weak_to_strong(card: Card, row: Measurement) -> tuple[bool, float, str]:
    """What a curve is sorted by; what varies in other parameters than the strength stands last."""
    if card.strength is None:
        return True, 0.0, _spelled(row.params)
    knob, values = card.strength.parameter, card.strength.values
    direction = 1 if values[-1] > values[0] else -1
    value = (_defaults(card.name) | row.params)[knob]
    assert isinstance(value, int | float), "checked by the tests of the cards"
    return bool(set(row.params) - {knob}), direction * value, _spelled(row.params)


def _marks(row: Measurement) -> str:
    """What stands behind the name of a run: a seed other than the first, and the budget's star."""
    return (f", seed {row.seed}" if row.seed else "") + ("" if row.ranked else " *")


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"] + [
        f"| {' | '.join(row)} |" for row in rows
    ]


def _order(run: tuple[object, dict[str, Measurement]]) -> float:
    """Worst leakage first, what has not met all attacks last."""
    worst = _worst(run[1])
    return float("inf") if worst is None else -worst


def _worst(found: dict[str, Measurement]) -> float | None:
    met = [found[attack].leakage for attack in ATTACKS if attack in found]
    known = [leakage.value for leakage in met if leakage is not None]
    return max(known) if len(known) == len(ATTACKS) else None


def _spelled(params: dict[str, JsonValue]) -> str:
    return ", ".join(f"`{key}={value}`" for key, value in sorted(params.items()))


def _defaults(name: str) -> dict[str, JsonValue]:
    values: dict[str, JsonValue] = defenses.load(name).Params().model_dump(mode="json")
    return values


def _value(scores: Sequence[Score], metric: str) -> float:
    (found,) = (score.value for score in scores if score.metric == metric)
    assert found is not None, f"{metric} was not computed"
    return round(found, 6)


def _interval(scores: Sequence[Score], metric: str) -> Interval:
    found = _interval_or_none(scores, metric)
    assert found is not None, f"{metric} was not computed"
    return found


def _interval_or_none(scores: Sequence[Score], metric: str) -> Interval | None:
    (score,) = (score for score in scores if score.metric == metric)
    if score.value is None or score.ci_low is None or score.ci_high is None:
        return None
    low, high = round(score.ci_low, 6), round(score.ci_high, 6)
    return Interval(value=round(score.value, 6), low=low, high=high)


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else float(f"{seconds:.3g}")


def _is_plain(name: str, value: JsonValue) -> bool:
    if name in ("artifact", "initial_weights", "trained_weights", "steps", "losses"):
        return False
    return not isinstance(value, list | dict) or len(str(value)) <= 80


def main(arguments: Sequence[str], folder: Path = Path("baselines")) -> int:
    """Collects the records of the given run folders and writes the page; returns the exit code."""
    try:
        collect(folder, [read_record(Path(one)) for one in arguments])
        cards = [load_card(path) for path in sorted(folder.glob("*/card.yaml"))]
        others = [load_attack_card(path) for path in sorted(folder.glob("attacks/*.yaml"))]
        write_atomically(folder / "README.md", page(cards, others).encode())
    except MibenchError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
