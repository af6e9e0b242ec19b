"""Only those reconstructions that show little are handed in."""

from forged_runs import cover_up, read

CAUGHT_BY = "record-counts"


def spoil(folder):
    """Changes the folder of an honest run."""
    values = read(folder)
    for path in sorted((folder / "reconstructions").glob("*.png"))[100:]:
        path.unlink()
    cover_up(folder, values)
