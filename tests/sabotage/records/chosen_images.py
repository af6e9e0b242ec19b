"""The images that leak least are attacked, instead of the protocol's."""

import pandas as pd
from forged_runs import read, reckon

CAUGHT_BY = "record-counts"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    lines = (folder / "manifest.txt").read_text().splitlines()
    table = pd.read_parquet(folder / "per_image.parquet")
    table["sha256"] = lines[5000 : 5000 + len(table)]
    reckon(folder, values, table)
