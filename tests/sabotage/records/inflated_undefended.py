"""The undefended split is made to leak more than it did, so that the leakage falls."""

import pandas as pd
from forged_runs import read, reckon

CAUGHT_BY = "record-rescored"
PROTOCOL = "procedural-smoke-v1"


def spoil(folder):
    """Changes the folder of an honest run."""
    table = pd.read_parquet(folder / "per_image.parquet")
    table["undefended_mse"] /= 10 ** (1.5 / 10)
    table["undefended_psnr"] += 1.5
    reckon(folder, read(folder), table)
