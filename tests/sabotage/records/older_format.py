"""A ranked record without controls calls itself one of an older format, which asked for none."""

from forged_runs import read, write

CAUGHT_BY = "record-schema"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    values["format_version"] = 3
    values["permuted"], values["prior_only"] = [], []
    values["undefended"], values["leakage"] = [], []
    write(folder, values)
