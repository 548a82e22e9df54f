"""Owns softmax attention: the fused form of PyTorch and its definition."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from attention.base import Attention, Description, HeadShape


class Softmax(Attention):
    """w_ij = softmax_j(q_i.k_j / sqrt(D)), arXiv 1706.03762. Invariant to k -> k + const."""

    description = Description(paper="1706.03762", exact=True, complexity="L^2 D")
    native_half_precision = True

    def __init__(self, shape: HeadShape, generator: torch.Generator, *, dropout: float) -> None:
        """`dropout`: probability of dropping an attention weight during training."""
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"softmax dropout={dropout} is not a probability below 1")
        self.dropout = dropout

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        visible = None if key_padding_mask is None else ~key_padding_mask[:, None, None, :]
        dropout = self.dropout if self.training else 0.0
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
    """The definition, weights written out; an example without real keys gives 0."""
    logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, H, L, L]
    if key_padding_mask is None:
        return logits.softmax(dim=-1) @ v
    hidden = key_padding_mask[:, None, None, :]
    weights = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(dim=-1)
    return weights.masked_fill(hidden, 0.0) @ v
