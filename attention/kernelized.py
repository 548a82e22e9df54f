"""Owns exact kernelised attention: any dot-product kernel K(t), and the Gaussian. Quadratic in the length."""

import math

import torch
from torch import Tensor

from attention.base import Attention, Description, HeadShape, count_keys
from attention.fused.kernelized import kernelized_sums
from attention.kernels import Kernel
from attention.normalizers import Normalizer
from attention.regularizers import PostFactory, PreFactory, RegularizedAttention, TemperatureFactory


class KernelizedAttention(RegularizedAttention):
    """w_ij = K(tau pre(q_i).pre(k_j) / sqrt(D)): the definition that SchoenbAt estimates, arXiv 2505.12252."""

    description = Description(paper="2505.12252", exact=True, complexity="L^2 D")

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        kernel: Kernel,
        pre: PreFactory,
        temperature: TemperatureFactory,
        normalizer: Normalizer,
        post: PostFactory,
    ) -> None:
        """Raises ValueError when the regularised argument may leave the kernel's domain. Without a pre-SBN there is
        no bound to check here; then every forward checks its own arguments."""
        super().__init__(shape, generator, pre=pre, temperature=temperature, post=post)
        self.kernel, self.normalizer = kernel, normalizer
        if math.isfinite(self.max_argument):
            kernel.check_bound(self.max_argument)
        own = {} if normalizer.row_stochastic else {"U3": f"normaliser {normalizer.policy} is not row-stochastic"}
        self.exemptions = {**self.pre_q.exemptions, **own}

    def core(self, x: Tensor, y: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        check_domain = math.isinf(self.max_argument)
        sums, totals = kernelized_sums(self.kernel, x, y, v, key_padding_mask, check_domain)
        return self.normalizer.divide(sums, totals, count_keys(y, key_padding_mask))


class GaussianAttention(Attention):
    """out_i = sum_j exp(-|q_i - k_j|^2 / (2 sqrt(D))) v_j, Skyformer, arXiv 2111.00035. Not normalised: out grows with
    the number of keys. Invariant to (q, k) -> (q + c, k + c)."""

    description = Description(paper="2111.00035", exact=True, complexity="L^2 D")
    exemptions = {"U3": "kernelised attention has no row normalisation by definition"}

    def __init__(self, shape: HeadShape, generator: torch.Generator) -> None:
        super().__init__()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> Tensor:
        scale = q.shape[-1] ** -0.25
        weights = gaussian_kernel(q * scale, k * scale)
        if key_padding_mask is not None:
            weights = weights.masked_fill(key_padding_mask[:, None, None, :], 0.0)
        return weights @ v


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    """exp(-|x_i - y_j|^2 / 2): x [..., N, D], y [..., M, D] -> [..., N, M]."""
    half_norms = x.square().sum(dim=-1, keepdim=True) / 2, y.square().sum(dim=-1).unsqueeze(-2) / 2
    # the clamp removes what rounding may leave above 0
    return (x @ y.transpose(-2, -1) - half_norms[0] - half_norms[1]).clamp_max(0.0).exp()
