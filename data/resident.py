"""Owns a split that is held on a device as a whole, so that batches are gathered where the model is.

Legend: B batch, S sequences per example, L length, N examples.
"""

import numpy as np
import torch
from torch import Tensor

from data.encoded import EncodedSplit


class ResidentSplit:
    """The arrays of an EncodedSplit on `device`: one or two bytes per token, and ten per example."""

    def __init__(self, split: EncodedSplit, device: torch.device) -> None:
        tokens = np.array(split.tokens)  # a copy: the file is mapped read-only
        if tokens.dtype == np.uint16:  # torch has no indexing of uint16 on every device; gather masks the sign again
            tokens = tokens.view(np.int16)
        self._tokens = torch.from_numpy(tokens).to(device)
        self._offsets = torch.from_numpy(np.array(split.offsets)).to(device)
        self._labels = torch.from_numpy(np.array(split.labels)).to(device)
        self._lengths, self._num_sequences, self._device = split.lengths(), split.num_sequences, device

    def gather(self, index: np.ndarray, pad_to: int | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """As EncodedSplit.gather, in tensors on the device. Lengths are known here as well, so nothing waits for it."""
        true_lengths = self._lengths[index]  # [B, S]
        length = int(true_lengths.max()) if pad_to is None else pad_to
        examples = torch.from_numpy(index).to(self._device)
        rows = examples[:, None] * self._num_sequences + torch.arange(
            self._num_sequences, device=self._device
        )  # [B, S]
        starts = self._offsets[rows]
        lengths = self._offsets[rows + 1] - starts
        positions = torch.arange(length, device=self._device)
        place = starts[..., None] + torch.minimum(positions, (lengths - 1).clamp(min=0)[..., None])  # [B, S, L]
        tokens = self._tokens[place.clamp(max=len(self._tokens) - 1)].long()
        if self._tokens.dtype == torch.int16:
            tokens &= 0xFFFF
        labels = self._labels[examples].long()
        if true_lengths.min() == length:
            return tokens, None, labels
        padding = positions >= lengths[..., None]
        return tokens.masked_fill_(padding, 0), padding, labels
