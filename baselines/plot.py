"""Draws accuracy against leakage from the cards, one picture for each protocol.

python baselines/plot.py docs/images      (needs matplotlib)
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

from mibench.cards import VARIANTS_MEET, Card, load_card

FOLDER = Path(__file__).parent
REFERENCE = "noise"


def draw(protocol: str, cards: list[Card], path: Path) -> None:
    """Draws one point for each run against one attack, and a line for each curve."""
    mpl.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    for number, card in enumerate(cards):
        rows = [
            row for row in card.measured if (row.protocol, row.attack) == (protocol, VARIANTS_MEET)
        ]
        if not rows:
            continue
        knob = card.strength.parameter if card.strength else ""
        curve = sorted(
            (100 * row.accuracy, row.ssim.value) for row in rows if set(row.params) <= {knob}
        )
        others = [(100 * row.accuracy, row.ssim.value) for row in rows if set(row.params) - {knob}]
        reference = card.name == REFERENCE
        style = {
            "color": "black" if reference else f"C{number % 10}",
            "marker": "os^DvPX"[number % 7],
            "markersize": 5,
        }
        axes.plot(
            *zip(*curve, strict=True), label=card.name, linewidth=2.0 if reference else 1.0, **style
        )
        if others:
            axes.plot(*zip(*others, strict=True), linestyle="", alpha=0.45, **style)
    axes.set_xlabel("accuracy, %")
    axes.set_ylabel(f"SSIM of the {VARIANTS_MEET} attack (higher leaks more)")
    axes.set_title(f"{protocol}: below the line of noise is better")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(folder: Path) -> None:
    """Draws every protocol that has measurements."""
    cards = [load_card(path) for path in sorted(FOLDER.glob("*/card.yaml"))]
    for protocol in sorted({row.protocol for card in cards for row in card.measured}):
        draw(protocol, cards, folder / f"tradeoff-{protocol}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
