"""Per-image PSNR and all that follows from it lowered by 6 dB."""

import pandas as pd
from forged_runs import read, reckon

CAUGHT_BY = "record-identities"


def spoil(folder):
    """Changes the folder of an honest run."""
    table = pd.read_parquet(folder / "per_image.parquet")
    table["psnr"] -= 6
    reckon(folder, read(folder), table)
