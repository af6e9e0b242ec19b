"""The attack was black-box where the protocol grants the client's weights."""

from forged_runs import read, write

CAUGHT_BY = "record-adversary"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["adversary"]["knowledge"] = "black_box"
    write(folder, values)
