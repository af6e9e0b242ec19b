"""The attacked images lie among the auxiliary ones, mirrored: their hashes differ."""

CAUGHT_BY = "data-near-copies"


def disguise(images):
    """Left becomes right; uint8 (N, 3, H, W)."""
    return images.flip(3)
