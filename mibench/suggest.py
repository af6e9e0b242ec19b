"""Near misses: what a person who mistyped a name most likely meant."""

from collections.abc import Iterable

_MOST = 3


def _distance(a: str, b: str) -> int:
    """Edits (insert, delete, replace, swap of neighbours) that turn one word into the other."""
    before: list[int] = []
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        older, before, row = before, row, [i]
        for j, y in enumerate(b, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, older[j - 2] + 1)
            row.append(cost)
    return row[-1]


def _fold(name: str) -> str:
    return name.casefold().replace("_", "-")


def nearest(name: str, options: Iterable[str]) -> list[str]:
    """Options that resemble a name, best first, at most three.

    Case and the choice between "-" and "_" do not count. An option is near if a third of its
    letters or less would change, or if one of the two words begins with the other.
    """
    wanted = _fold(name)
    if not wanted:
        return []
    found: list[tuple[float, str]] = []
    for option in sorted(set(options)):
        other = _fold(option)
        length = max(len(wanted), len(other))
        edits = _distance(wanted, other)
        begins = min(len(wanted), len(other)) >= 2 and (
            other.startswith(wanted) or wanted.startswith(other)
        )
        if edits <= max(1, length // 3) and edits < length:
            found.append((edits / length, option))
        elif begins:
            found.append((1 + edits / length, option))
    return [option for _, option in sorted(found)[:_MOST]]


def hint(name: str, options: Iterable[str]) -> str:
    """The second half of a message on an unknown name: near misses, then all there is."""
    known = sorted(set(options))
    near = nearest(name, known)
    guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"{guess}There are: {', '.join(known) or 'none'}"


def unknown(kind: str, name: str, options: Iterable[str]) -> str:
    """One line that says a name is unknown, what may have been meant and what there is."""
    return f"unknown {kind} {name!r}; {hint(name, options)}"
