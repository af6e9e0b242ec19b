"""The standing challenge to attackers: frozen shares go out, reconstructions come back.

What an attacker needs is here: `open_challenge` reads the folder that `mibench challenge export`
has written, and `save_reconstructions` writes what is to be sent back.
"""

from __future__ import annotations

from mibench.challenge.opened import Opened, open_challenge
from mibench.challenge.pictures import save_reconstructions
from mibench.challenge.schema import Challenge

__all__ = ["Challenge", "Opened", "open_challenge", "save_reconstructions"]
