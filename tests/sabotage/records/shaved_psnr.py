"""Half a decibel is taken off every image, which rounding to 8 bits once could have explained."""

import pandas as pd
from forged_runs import read, reckon

CAUGHT_BY = "record-rescored"
PROTOCOL = "procedural-smoke-v1"


def spoil(folder):
    """Changes the folder of an honest run."""
    table = pd.read_parquet(folder / "per_image.parquet")
    table["mse"] *= 10 ** (0.5 / 10)
    table["psnr"] -= 0.5
    reckon(folder, read(folder), table)
