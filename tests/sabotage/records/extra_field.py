"""A field that the format does not have."""

from forged_runs import read, write

CAUGHT_BY = "record-schema"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["certified_private"] = True
    write(folder, values)
