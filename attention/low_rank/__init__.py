"""Low-rank mechanisms, one per file."""
