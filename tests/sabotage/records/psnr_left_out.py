"""PSNR has no value, with a made-up reason, so nobody can hold the attack against its reference."""

import pandas as pd
from forged_runs import cover_up, read, score_of

CAUGHT_BY = "record-facts"
NUMBERS = ("value", "ci_low", "ci_high", "p50", "p95", "worst")


def spoil(folder):
    """Changes the folder of an honest run."""
    values, table = read(folder), pd.read_parquet(folder / "per_image.parquet")
    kept = [name for name in table.columns if not name.endswith("psnr")]
    table[kept].to_parquet(folder / "per_image.parquet", index=False)
    for place in ("scores", "undefended", "prior_only", "permuted"):
        score_of(values, place, "psnr").update(dict.fromkeys(NUMBERS), n=0, reason="no weights")
    share = score_of(values, "leakage", "leakage(psnr)")
    share.update(dict.fromkeys(NUMBERS), n=0, reason="no weights")
    values["calibration"] = []
    cover_up(folder, values)
