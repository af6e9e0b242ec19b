"""A mean that does not follow from its per-image values."""

from forged_runs import read, score_of, write

CAUGHT_BY = "record-means"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    psnr = score_of(values, "scores", "psnr")
    psnr["value"], psnr["ci_low"], psnr["ci_high"] = 14.31, 14.02, 14.66
    write(folder, values)
