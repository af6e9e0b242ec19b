"""The floor is called a guess that no attacker makes."""

from forged_runs import read, write

CAUGHT_BY = "record-facts"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    for one in values["prior_only"]:
        one["source"] = "a guess of my own"
    write(folder, values)
