"""Sparse and hashed mechanisms, one per file."""
