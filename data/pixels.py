"""Owns what the pixel tasks (Image, Pathfinder) share: pixels as ids, and the published habit of masking black ones.

Legend: B batch, S sequences per example (1 for both tasks), L length.
"""

from dataclasses import replace
from math import isqrt

import numpy as np

from data.base import Batch, Split, Task


class PixelTask(Task):
    """A task whose token ids are pixel values 0..255, row by row, every image of the same length max_len."""

    def __init__(
        self, *, source: str, vocab_size: int, max_len: int, datasets: str, pixel_zero_is_pad: bool = False
    ) -> None:
        """`pixel_zero_is_pad` imitates the suites that use id 0 both for black and for padding, and so hide black
        pixels from every position: Google's long-range-arena models/transformer/transformer.py:148,162-167 (also the
        Skyformer family). The default serves every pixel."""
        super().__init__(source=source, vocab_size=vocab_size, max_len=max_len, datasets=datasets)
        self.pixel_zero_is_pad = pixel_zero_is_pad

    @property
    def image_side(self) -> int:
        return isqrt(self.max_len)

    def _batch(self, split: Split, index: np.ndarray, pad_to: int | None) -> Batch:
        """With `pixel_zero_is_pad` the mask [B, S, L] is True at every black pixel, and an image that is black all
        over is an empty example."""
        batch = super()._batch(split, index, pad_to)
        return replace(batch, key_padding_mask=batch.tokens == 0) if self.pixel_zero_is_pad else batch
