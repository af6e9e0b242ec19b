"""Image sets: the embedded procedural one, and real ones in the hub's parquet layout."""
