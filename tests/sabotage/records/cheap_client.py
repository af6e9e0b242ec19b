"""The client is said to need fewer operations than none."""

from forged_runs import read, write

CAUGHT_BY = "record-facts"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["cost"]["client_flops"] = -1
    write(folder, values)
