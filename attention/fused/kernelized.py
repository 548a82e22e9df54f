"""Owns exact kernelised attention in blocks of queries and keys: quadratic time, linear memory, weights made in place.

The plain twin is `kernelized_sums_naive`. Legend: B batch, H heads, L length, D head_dim, E columns of v, P queries and
K keys of a block.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from attention.kernels import Kernel

# of the weights of one head in one block
_CPU_BYTES = 2**19  # stays in a core's cache
_GPU_BYTES = 2**28  # enough work for a launch


@torch.compiler.disable  # its loops over blocks write in place: to be called, not traced
def kernelized_sums(
    kernel: Kernel, x: Tensor, y: Tensor, v: Tensor, key_padding_mask: Tensor | None, check_domain: bool
) -> tuple[Tensor, Tensor]:
    """sum_j w_ij v_j [B, H, L, E] and sum_j w_ij [B, H, L, 1], w_ij = K(x_i.y_j / sqrt(D)), over real keys.

    `check_domain`: raise ValueError where an argument leaves the kernel's domain.
    """
    return _Sums.apply(kernel, x, y, v, key_padding_mask, check_domain)


def kernelized_sums_naive(
    kernel: Kernel, x: Tensor, y: Tensor, v: Tensor, key_padding_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The definition, all weights written out: O(L^2) memory."""
    weights = kernel.exact(x @ y.transpose(-2, -1) / math.sqrt(x.shape[-1]))
    if key_padding_mask is not None:
        weights = weights.masked_fill(key_padding_mask[:, None, None, :], 0.0)
    return weights @ v, weights.sum(dim=-1, keepdim=True)


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Example by example; queries inside, so that a block of keys stays in cache."""
    area = (_CPU_BYTES if x.device.type == "cpu" else _GPU_BYTES) // x.element_size()
    keys = min(y.shape[2], 2 ** (math.isqrt(area).bit_length() - 1))
    queries = min(x.shape[2], max(1, area // keys))
    for b in range(x.shape[0]):
        for j in range(0, y.shape[2], keys):
            for i in range(0, x.shape[2], queries):
                yield b, slice(i, min(i + queries, x.shape[2])), slice(j, min(j + keys, y.shape[2]))


def _arguments(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled x [H, P, D], y [H, K, D] -> [H, P, K], 0 at padding, which must not decide whether the domain is left."""
    t = torch.bmm(x, y.transpose(1, 2))
    return t if mask is None else t.masked_fill_(mask, 0.0)


class _Sums(Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, kernel: Kernel, x: Tensor, y: Tensor, v: Tensor, mask: Tensor | None, check_domain: bool
    ) -> tuple[Tensor, Tensor]:
        x = x / math.sqrt(x.shape[3])
        sums, totals = x.new_zeros(*x.shape[:3], v.shape[3]), x.new_zeros(*x.shape[:3], 1)
        for b, i, j in _blocks(x, y):
            hidden = None if mask is None else mask[b, j]
            t = _arguments(x[b, :, i], y[b, :, j], hidden)
            if check_domain:
                kernel.check_domain(t)
            weights = kernel.exact_(t)
            if hidden is not None:
                weights.masked_fill_(hidden, 0.0)
            sums[b, :, i] += torch.bmm(weights, v[b, :, j])
            totals[b, :, i] += weights.sum(dim=2, keepdim=True)
        ctx.kernel = kernel
        ctx.save_for_backward(x, y, v, mask)
        return sums, totals

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_sums: Tensor, d_totals: Tensor) -> tuple[Tensor | None, ...]:
        x, y, v, mask = ctx.saved_tensors
        d_x, d_y, d_v = torch.zeros_like(x), torch.zeros_like(y), torch.zeros_like(v)
        for b, i, j in _blocks(x, y):
            hidden, g = None if mask is None else mask[b, j], d_sums[b, :, i]
            t = _arguments(x[b, :, i], y[b, :, j], hidden)
            d_weights = torch.baddbmm(d_totals[b, :, i], g, v[b, :, j].transpose(1, 2))
            if hidden is not None:
                d_weights.masked_fill_(hidden, 0.0)
            with torch.enable_grad():
                weights = ctx.kernel.exact(t.requires_grad_())
                (d_t,) = torch.autograd.grad(weights, t, d_weights)
            weights = weights.detach() if hidden is None else weights.detach().masked_fill(hidden, 0.0)
            d_v[b, :, j] += torch.bmm(weights.transpose(1, 2), g)
            d_x[b, :, i] += torch.bmm(d_t, y[b, :, j])
            d_y[b, :, j] += torch.bmm(d_t.transpose(1, 2), x[b, :, i])
        return None, d_x / math.sqrt(x.shape[3]), d_y, d_v, None, None
