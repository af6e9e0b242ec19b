"""The attacked images lie among the auxiliary ones, as they are."""

CAUGHT_BY = "data-copies"


def disguise(images):
    """Nothing: uint8 (N, 3, H, W) as it is."""
    return images
