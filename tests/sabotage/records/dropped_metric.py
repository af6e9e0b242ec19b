"""An awkward metric is taken out of protocol and scores; the content id cannot see it."""

from forged_runs import read, write

CAUGHT_BY = "record-ranked"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    del values["protocol"]["values"]["metrics"]["recognition"]
    for place in ("scores", "undefended", "prior_only", "permuted", "leakage"):
        values[place] = [one for one in values[place] if "recognition" not in one["metric"]]
    write(folder, values)
