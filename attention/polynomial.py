"""Owns exact polynomial attention. Quadratic in the length."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from attention.base import Attention, Description, HeadShape


class PolynomialAttention(Attention):
    """w_ij = t_ij^p / (c + sum_j t_ij^p), t = scale LN(q).LN(k), p even. PolySketchFormer, arXiv 2310.01655.

    Evaluated as softmax over p log|t| with one sink of logit log c and value 0, which never overflows. With c = 0 the
    weights ignore the scale of each query; a query with t = 0 for every key gives 0.
    """

    description = Description(paper="2310.01655", exact=True, complexity="L^2 D")

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        degree: int,
        scale: float | None,
        sink: float,
        layer_norm: Literal["shared", "none"],
    ) -> None:
        """`scale`: factor of q.k, null for 1/sqrt(D). `sink`: c >= 0. `layer_norm`: "shared" is one affine layer norm
        for q and k, as in the paper's code; "none" as in arXiv 2310.20051."""
        super().__init__()
        if degree < 2 or degree % 2:
            raise ValueError(
                f"polynomial degree={degree} must be even and >= 2: odd powers give signed weights, whose sum may "
                f"vanish; use {max(2, degree - 1)} or {max(2, degree + 1)}"
            )
        if layer_norm not in ("shared", "none"):
            raise ValueError(f"unknown layer_norm={layer_norm!r}; choose shared or none")
        if sink < 0:
            raise ValueError(f"polynomial sink={sink} must be >= 0")
        self.degree, self.sink = degree, sink
        self.scale = 1 / math.sqrt(shape.head_dim) if scale is None else scale
        self.norm = nn.LayerNorm(shape.head_dim, eps=1e-5) if layer_norm == "shared" else nn.Identity()
        self.exemptions = {"U3": f"a sink of weight {sink} takes its share"} if sink else {}

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        t = self.scale * (self.norm(q) @ self.norm(k).transpose(-2, -1))  # [B, H, L, L]
        zero = t == 0
        if key_padding_mask is not None:
            zero = zero | key_padding_mask[:, None, None, :]
        logits = self.degree * t.abs().clamp_min(torch.finfo(t.dtype).tiny).log()
        logits = logits.masked_fill(zero, torch.finfo(t.dtype).min)
        if self.sink:
            sink = logits.new_full((1, 1, 1, 1), math.log(self.sink)).expand(*logits.shape[:-1], 1)
            weights = torch.cat([logits, sink], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            weights = logits.softmax(dim=-1)
        return weights.masked_fill(zero, 0.0) @ v
