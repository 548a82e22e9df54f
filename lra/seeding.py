"""Owns the derivation of seeds: one independent stream per purpose, all from `seed` in the config."""

import hashlib
from typing import Literal

Purpose = Literal["model", "data_order", "validation_order", "dropout", "measure"]


def derive_seed(seed: int, purpose: Purpose, part: str = "") -> int:
    """A 63-bit seed that is the same on every machine and unrelated between purposes, between seeds and between the
    parts of one purpose."""
    digest = hashlib.sha256(f"{purpose}:{seed}{part and f':{part}'}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
