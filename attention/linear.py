"""Owns linear attention: phi(Q) (phi(K)^T V) over any feature map, in O(L F D) time and O(L F + F D) memory."""

from collections.abc import Mapping

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape, count_keys, mask_keys
from attention.feature_maps.base import FeatureMapFactory, Features
from attention.normalizers import Normalizer


class LinearAttention(Attention):
    """out_i = phi(q_i) . sum_j phi(k_j) v_j^T / g(phi(q_i) . sum_j phi(k_j)), g the normaliser's policy."""

    def __init__(
        self, shape: HeadShape, generator: torch.Generator, *, feature_map: FeatureMapFactory, normalizer: Normalizer
    ) -> None:
        super().__init__()
        self.feature_map = feature_map(shape, generator)
        self.normalizer = normalizer
        if self.feature_map.sign == "signed" and normalizer.policy == "sum":
            raise ValueError(
                f"{type(self.feature_map).__name__} gives signed estimates, whose sum can be 0 or negative: "
                "a plain `sum` normaliser would divide by it. Use normalizer.policy=signed_clamp (or abs_clamp)."
            )

    @property
    def description(self) -> Description:  # type: ignore[override]
        return self.feature_map.description

    @property
    def exemptions(self) -> Mapping[str, str]:  # type: ignore[override]
        own = (
            {}
            if self.normalizer.row_stochastic
            else {"U3": f"normaliser {self.normalizer.policy} is not row-stochastic"}
        )
        return {**getattr(self.feature_map, "exemptions", {}), **own}

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        num_keys = count_keys(k, key_padding_mask)
        fused = self.feature_map.fused(q, k, v, key_padding_mask, self.normalizer, num_keys)
        if fused is not None:
            return fused
        phi_q, phi_k = self.features(q, k, key_padding_mask)
        return linear_attention(phi_q, phi_k, v, self.normalizer, num_keys)

    def features(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """phi(q), phi(k) [B, H, L, F], stabilised, with padded keys at 0: all that the mechanism's weights depend on."""
        prepared = self.feature_map.prepare(q, k, key_padding_mask)
        features_q = self.feature_map(q, True, prepared)
        features_k = self.feature_map(k, False, prepared)
        return stabilize(features_q, features_k, key_padding_mask)


def linear_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor, normalizer: Normalizer, num_keys: Tensor) -> Tensor:
    """phi_q, phi_k [B, H, L, F] (padded keys already 0), v [B, H, L, D] -> [B, H, L, D]. Two products."""
    state = phi_k.transpose(-2, -1) @ v  # [B, H, F, D]
    if normalizer.policy == "none":
        return phi_q @ state
    denominator = phi_q @ phi_k.sum(dim=-2).unsqueeze(-1)  # [B, H, L, 1]
    return normalizer.divide(phi_q @ state, denominator, num_keys)


def quadratic_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor, normalizer: Normalizer, num_keys: Tensor) -> Tensor:
    """The definition of `linear_attention`, with the weights written out: the oracle of every fast form."""
    weights = phi_q @ phi_k.transpose(-2, -1)  # [B, H, L, L]
    return normalizer.divide(weights @ v, weights.sum(dim=-1, keepdim=True), num_keys)


def stabilize(q: Features, k: Features, key_padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Turn Features into phi(q), phi(k) with padded keys at 0; exact, because every shift cancels in the ratio.

    Each feature's largest real key is brought to e^0 and the shift is moved to the queries, whose own maximum cancels
    row by row: no feature underflows as a whole. Maxima carry no gradient, since their factor cancels.
    """
    if q.logits is None or k.logits is None:
        assert q.values is not None and k.values is not None
        return q.values, mask_keys(k.values, key_padding_mask)
    visible = k.logits
    if key_padding_mask is not None:
        visible = visible.masked_fill(key_padding_mask[:, None, :, None], -torch.inf)
    shift = visible.amax(dim=2, keepdim=True).detach()  # [B, H, 1, F or 1]
    phi_k = (visible - shift).exp()  # exp(-inf) = 0 at padding
    logits_q = q.logits + shift
    phi_q = (logits_q - logits_q.amax(dim=-1, keepdim=True).detach()).exp()
    if k.values is not None:
        phi_k = mask_keys(k.values, key_padding_mask) * phi_k
    if q.values is not None:
        phi_q = q.values * phi_q
    return phi_q, phi_k
