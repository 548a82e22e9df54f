"""Owns SchoenbAt: ppSBN around linear attention over random Maclaurin features.

Legend: B batch, H heads, L length, D head_dim, F num_features, C chunk.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from attention.base import Description, HeadShape, count_keys
from attention.feature_maps.maclaurin import Maclaurin
from attention.linear import LinearAttention
from attention.normalizers import Normalizer
from attention.regularizers import PostFactory, PreFactory, RegularizedAttention, TemperatureFactory

_CHUNK = 128  # of the causal form: L/C states of F x D against L x C weights


class SchoenbAt(RegularizedAttention):
    """out = post(sum_j phi(x_i).phi(y_j) v_j / sum_j phi(x_i).phi(y_j)), x, y = pre-SBN(q, k), arXiv 2505.12252.

    Converges to KernelizedAttention with the same kernel and regularisers as num_features grows.
    """

    description = Description(paper="2505.12252", exact=False, complexity="L F D")
    native_half_precision = True  # `mix` turns to float32 itself where no fused op takes bf16

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        pre: PreFactory,
        temperature: TemperatureFactory,
        feature_map: Callable[[HeadShape, torch.Generator], Maclaurin],
        normalizer: Normalizer,
        post: PostFactory,
        causal: bool,
    ) -> None:
        """`causal`: position i sees keys j <= i only; a quirk of the authors' released code, not of the method."""
        super().__init__(shape, generator, pre=pre, temperature=temperature, post=post)
        self.linear = LinearAttention(shape, generator, feature_map=feature_map, normalizer=normalizer)
        self.causal = causal
        features = self.linear.feature_map
        if features.centred or math.isfinite(self.max_argument):
            features.dot_kernel.check_bound(self.max_argument)
        if features.centred and not normalizer.row_stochastic:
            raise ValueError(
                f"feature_map.centred=true leaves a factor in each row that normalizer.policy={normalizer.policy} would "
                "not cancel; use clamp_min or signed_clamp with a small constant"
            )
        if causal and features.centred:
            raise ValueError("causal=true contradicts feature_map.centred=true: the mean key would reveal later keys")
        quirk = "prefix sums: position i sees keys up to i (authors' released code)"
        own = {"U5": quirk, "U6": quirk} if causal else {}
        self.exemptions = {**self.pre_q.exemptions, **self.linear.exemptions, **own}

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        """As the frame defines it; in one op where pre-SBN and temperature can join the features' blocks."""
        unit, wide = self.pre_q.unit, torch.promote_types(v.dtype, torch.float32)
        if self.causal or unit is None:
            return super().mix(q.to(wide), k.to(wide), v.to(wide), key_padding_mask)
        features, normalizer = self.linear.feature_map, self.linear.normalizer
        num_keys = count_keys(k[..., :1].to(wide), key_padding_mask)  # bf16 cannot count
        tau = self.temperature()
        scale = tau.sqrt() if isinstance(tau, Tensor) else q.new_full((q.shape[1], 1, 1), math.sqrt(tau), dtype=wide)
        scale = None if isinstance(tau, float) and tau == 1.0 else scale
        gain = self.post.gain
        out = features.fused(q, k, v, key_padding_mask, normalizer, num_keys, unit, scale, gain)
        if out is None:
            return super().mix(q.to(wide), k.to(wide), v.to(wide), key_padding_mask)
        return self.post(out.to(wide)) if gain is None else out

    def core(self, x: Tensor, y: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        if not self.causal:
            return self.linear.mix(x, y, v, key_padding_mask)
        phi_x, phi_y = self.linear.features(x, y, key_padding_mask)
        num_keys = torch.ones_like(v[:, :1, :, :1])
        if key_padding_mask is not None:
            num_keys = (~key_padding_mask)[:, None, :, None].to(v.dtype)
        return causal_linear_attention(phi_x, phi_y, v, self.linear.normalizer, num_keys.cumsum(dim=2))

    @torch.no_grad()
    def count_negative_denominators(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None = None) -> int:
        """Number of queries whose estimated sum of weights is <= 0, over B, H and L, without the causal quirk.

        A diagnostic, not part of `forward`: any count above 0 means that the inputs are too large for the number of
        features (lower the temperature, use a pre-SBN, or raise num_features).
        """
        phi_x, phi_y = self.linear.features(*self.regularize(q, k, key_padding_mask), key_padding_mask)
        return int((phi_x @ phi_y.sum(dim=-2).unsqueeze(-1) <= 0).sum())


def causal_linear_attention(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, normalizer: Normalizer, num_keys: Tensor
) -> Tensor:
    """Row i sums over keys j <= i: phi_q, phi_k [B, H, L, F], v [B, H, L, D], num_keys [B, 1, L, 1] -> [B, H, L, D].

    Chunk by chunk: a state carried from all earlier chunks, and triangular weights inside a chunk. Memory
    O(L F D / C + L C) where prefix sums of outer products would take O(L F D).
    """
    length = v.shape[2]
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)  # the last column sums the weights
    pad = (0, 0, 0, -length % _CHUNK)
    q, k, u = (functional.pad(x, pad).unflatten(2, (-1, _CHUNK)) for x in (phi_q, phi_k, values))  # [B, H, L/C, C, .]
    states = (k.transpose(-2, -1) @ u).cumsum(dim=2)  # [B, H, L/C, F, D+1]
    earlier = functional.pad(states[:, :, :-1], (0, 0, 0, 0, 1, 0))
    sums = (q @ earlier + (q @ k.transpose(-2, -1)).tril() @ u).flatten(2, 3)[:, :, :length]
    return normalizer.divide(sums[..., :-1], sums[..., -1:], num_keys)
