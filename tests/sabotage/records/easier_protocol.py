"""A client trained ten times as long as the protocol says, under its released id."""

from forged_runs import read, write

CAUGHT_BY = "record-ranked"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["protocol"]["values"]["recipe"]["steps"] = 12000
    write(folder, values)
