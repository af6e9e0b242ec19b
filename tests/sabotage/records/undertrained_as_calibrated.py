"""An attack that stays 3 dB below the reference, reported as calibrated."""

import pandas as pd
from forged_runs import read, reckon

CAUGHT_BY = "record-calibration"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    table = pd.read_parquet(folder / "per_image.parquet")
    weaker = table["undefended_psnr"].mean() - (values["calibration"][0]["reference"] - 3)
    table["undefended_psnr"] -= weaker
    table["undefended_mse"] *= 10 ** (weaker / 10)
    reckon(folder, values, table)
