"""Owns the ids of text that is read byte by byte, as Text and Retrieval do (arXiv:2011.04006)."""

import numpy as np

NUM_IDS = 257  # padding and 256 bytes


def byte_ids(text: bytes, max_len: int) -> np.ndarray:
    """uint16 [min(length, max_len)]: byte + 1 of the head of the text, so that 0 is free for padding."""
    return np.frombuffer(text[:max_len], dtype=np.uint8).astype(np.uint16) + 1


def text_of(ids: np.ndarray) -> str:
    """The text again; a character that was cut, or bytes that are no UTF-8, are shown as U+FFFD."""
    return (ids - 1).astype(np.uint8).tobytes().decode("utf-8", errors="replace")
