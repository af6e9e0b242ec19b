"""The measures of information are left out."""

from forged_runs import read, write

CAUGHT_BY = "record-facts"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["information"] = []
    write(folder, values)
