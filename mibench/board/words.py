"""Numbers and addresses as the pages show them: each kind by one function."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from pydantic import JsonValue

from mibench.record import AdversaryFacts, Cost, Score

DASH = "–"
"""Stands where there is no value; the reason is told beside it."""
DIGITS = {"psnr": 1, "fid": 1, "mse": 4, "kid": 4, "volume": 0, "volume-coded": 0}
"""Decimals by metric; all others have two."""

_ARXIV = re.compile(r"(?:arxiv:)?(\d{4}\.\d{4,5}(?:v\d+)?)", re.IGNORECASE)
_UNITS = (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")


def number(value: float, digits: int = 2) -> str:
    """A number with a fixed count of decimals, thousands set apart, and a real minus.

    What four decimals would show as nothing has one digit and its power of ten.
    """
    text = f"{value:,.{digits}f}"
    if not text.strip("-0.,"):
        tiny = value and digits >= 4
        text = f"{value:.0e}" if tiny else text.lstrip("-")  # nothing is less than nothing
    return text.replace("-", "−")


def sortable(value: float) -> str:
    """A number for the page's script, which sorts by it."""
    return f"{value:.9g}"


def percent(share: float) -> str:
    """A share in percent."""
    return f"{number(100 * share, 1)} %"


def of(score: Score) -> str:
    """The value of a score without its unit, or a dash."""
    return DASH if score.value is None else number(score.value, digits(score.metric))


def interval(score: Score) -> str:
    """The 95 % interval of a score; empty where it has none."""
    if score.ci_low is None or score.ci_high is None:
        return ""
    return between(score.ci_low, score.ci_high, digits(score.metric))


def between(low: float, high: float, digits: int) -> str:
    """An interval: with a dash, or in words where a minus would be read as one."""
    one, other = number(low, digits), number(high, digits)
    return f"{one} to {other}" if "−" in one + other else f"{one}–{other}"


def digits(metric: str) -> int:
    """Decimals of a metric, or of a value of another name such as ``leakage(psnr)``."""
    return DIGITS.get(metric, 2)


def found(scores: list[Score], metric: str) -> Score | None:
    """The score of a metric, or of its leakage, among those of a record."""
    named = (one for one in scores if one.metric in (metric, f"leakage({metric})"))
    return next(named, None)


def flops(count: int) -> str:
    """A count of operations."""
    for scale, letter in _UNITS:
        if count >= scale:
            value = count / scale
            return f"{number(value, 2 if value < 10 else 1 if value < 100 else 0)} {letter}FLOPs"
    return f"{count} FLOPs"


def times(value: float) -> str:
    """A ratio to the undefended client."""
    return f"{number(value, 2 if value < 10 else 0)}×"


def size(count: int) -> str:
    """A count of bytes."""
    return f"{number(count / 1024, 1)} KiB" if count >= 1024 else f"{count} B"


def ratio(cost: Cost) -> float:
    """Client FLOPs as a multiple of the undefended client's."""
    return cost.client_flops / max(cost.undefended_client_flops, 1)


def adversary(facts: AdversaryFacts, cost: Cost | None) -> str:
    """Who attacks, in a few words."""
    servers = len(cost.values_per_server) if cost else 0
    sizes = {len(one) for one in facts.coalitions} or {len(facts.corrupted)}
    read = " or ".join(map(str, sorted(sizes)))
    words = [facts.knowledge.replace("_", " ")]
    if servers > 1:
        words.append(f"reads {read} of {servers} servers")
    if len(facts.coalitions) > 1:
        words.append("every coalition in turn")
    if facts.transmissions > 1:
        words.append(f"sees {facts.transmissions} transmissions")
    if facts.auxiliary != "disjoint":
        whose = {"training": "has the training images", "other": "has images of another dataset"}
        words.append(whose.get(facts.auxiliary, facts.auxiliary))
    return ", ".join(words)


def setting(adversary: Mapping[str, JsonValue]) -> str:
    """The adversary that a protocol fixes."""
    size, sent = adversary.get("coalition", 1), adversary.get("transmissions", 1)
    told = [str(adversary.get("knowledge", "")).replace("_", " ")]
    told.append("reads one server" if size == 1 else f"reads {size} servers together")
    told.append("each image sent once" if sent == 1 else f"each image sent {sent} times")
    return ", ".join(told)


def address(text: str) -> str | None:
    """Where a text may lead: an https address or an arXiv number. Anything else leads nowhere."""
    if match := _ARXIV.fullmatch(text.strip()):
        return f"https://arxiv.org/abs/{match[1]}"
    if not text.isprintable() or any(sign in text for sign in " <>\"'`\\"):
        return None
    try:
        parts = urlsplit(text)
        named = parts.hostname
    except ValueError:
        return None
    return text if text.startswith("https://") and named and "@" not in parts.netloc else None
