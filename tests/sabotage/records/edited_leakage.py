"""A normalised leakage that is half of what the scores give."""

from forged_runs import read, write

CAUGHT_BY = "record-leakage"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    for one in values["leakage"]:
        for key in ("value", "ci_low", "ci_high"):
            one[key] = None if one[key] is None else one[key] / 2
    write(folder, values)
