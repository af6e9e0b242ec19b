"""The judge is a smaller network than the released protocol's; the content id cannot see it."""

from forged_runs import read, write

CAUGHT_BY = "record-ranked"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["protocol"]["values"]["judge"]["width"] = 1
    write(folder, values)
