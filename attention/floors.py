"""Owns the floors of the comparison: mechanisms that never look at q and k, which every attention has to beat."""

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape, mean_over_keys


class MeanPool(Attention):
    """out_i = mean of the real values: softmax attention with all logits equal."""

    description = Description(paper="-", exact=True, complexity="L D")

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        return mean_over_keys(v, key_padding_mask).expand(*q.shape[:3], v.shape[-1])


class Identity(Attention):
    """out_i = v_i: no position learns of another, so the model is a bag of tokens (pooling is all that mixes)."""

    description = Description(paper="-", exact=True, complexity="L D")
    exemptions = {
        "U5": "each position returns its own value, so that permuting the values permutes the output",
        "U6": "by definition no position sees another one",
    }

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        return v
