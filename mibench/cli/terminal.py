"""The console that commands write to."""

from __future__ import annotations

import sys

from rich.console import Console

PLAIN_WIDTH = 100
"""Columns where there is no terminal to ask."""


def console() -> Console:
    """Returns a console on the current standard output that prints text as it is.

    Without markup and highlighting: names of files and parameters may hold brackets.
    """
    width = None if sys.stdout.isatty() else PLAIN_WIDTH
    return Console(markup=False, highlight=False, width=width)
