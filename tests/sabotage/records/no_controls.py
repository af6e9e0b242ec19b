"""The controls are left out: nobody can tell what a blind guess gets."""

from forged_runs import read, write

CAUGHT_BY = "record-schema"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["permuted"], values["prior_only"], values["leakage"] = [], [], []
    write(folder, values)
