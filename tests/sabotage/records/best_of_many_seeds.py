"""The best of many seeds, marked as ranked as if it were the protocol's own."""

import pandas as pd
from forged_runs import read, reckon

CAUGHT_BY = "record-ranked"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["seed"] = 1217
    reckon(folder, values, pd.read_parquet(folder / "per_image.parquet"))
