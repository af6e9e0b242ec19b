"""The name of a protocol that was not run."""

from forged_runs import read, write

CAUGHT_BY = "record-ranked"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["protocol"]["id"] = values["protocol"]["values"]["id"] = "cifar10-standard-resnet18-v1"
    write(folder, values)
