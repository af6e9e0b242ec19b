"""Half of the protocol's images are attacked, and every number follows from that half."""

import pandas as pd
from forged_runs import read, reckon

CAUGHT_BY = "record-counts"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["data"]["images"]["attacked"] = 64
    for path in sorted((folder / "reconstructions").glob("*.png"))[64:]:
        path.unlink()
    reckon(folder, values, pd.read_parquet(folder / "per_image.parquet")[:64])
