"""Owns Linformer: softmax attention over k learned mixtures of the keys and values.

Legend: B batch, H heads, L length, D head_dim, k projected_len.
"""

import torch
from torch import Tensor, nn

from attention.base import Attention, Description, HeadShape, mask_keys


class Linformer(Attention):
    """out = softmax(q (E K)^T / sqrt(D)) F V with learned E, F [H or 1, k, max_len] (2006.04768).

    Padded rows of K and V are set to 0, which removes them from every mixture; the mixtures themselves need no mask.
    A sequence of length L uses the first L columns of E and F, so their entries belong to positions.
    """

    description = Description(paper="2006.04768", exact=False, complexity="L k D")
    exemptions = {
        "U3": "the rows of F need not sum to 1, so constant values are rescaled",
        "U5": "every position has its own column in E and F",
    }

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        projected_len: int,
        share_heads: bool,
        share_keys_values: bool,
        init_std: float,
    ) -> None:
        """`projected_len`: k. `share_heads`: one E (and F) for all heads. `share_keys_values`: F = E.
        `init_std`: the entries start as N(0, init_std^2)."""
        super().__init__()
        size = (1 if share_heads else shape.num_heads, projected_len, shape.max_len)
        self.project_keys = nn.Parameter(init_std * torch.randn(size, generator=generator))
        if share_keys_values:
            self.register_parameter("project_values", None)
        else:
            self.project_values = nn.Parameter(init_std * torch.randn(size, generator=generator))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        length, max_len = k.shape[2], self.project_keys.shape[-1]
        if length > max_len:
            raise ValueError(f"Linformer is built for max_len={max_len} and got {length} positions; raise max_len")
        to_keys = self.project_keys[..., :length]  # [H or 1, k, L]
        to_values = to_keys if self.project_values is None else self.project_values[..., :length]
        mixed_keys = to_keys @ mask_keys(k, key_padding_mask)  # [B, H, k, D]
        mixed_values = to_values @ mask_keys(v, key_padding_mask)
        logits = q @ mixed_keys.transpose(-2, -1) * q.shape[-1] ** -0.5
        return logits.softmax(dim=-1) @ mixed_values
