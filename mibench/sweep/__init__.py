"""Grids of runs: read from a file, carried out by an executor, and gone on with after a stop."""
