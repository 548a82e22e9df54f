"""Owns linear attention over random Maclaurin features on a GPU: differentiable, in Triton, no feature ever stored.

The plain twin is `attention.feature_maps.maclaurin.Maclaurin.forward` with `attention.linear.linear_attention`, the
same function on a CPU `attention.fused.maclaurin`. Importing this file needs triton.
Legend: B batch, H heads, L length, D head_dim, E columns of v, M monomials.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from attention.base import mask_keys
from attention.fused.blocks import Monomials, Prologue, UnitNorm
from attention.fused.maclaurin import slope_of
from attention.fused.triton_launch import Packed, Tokens, accumulate, differentiate, floors_of, pack, read, weigh
from attention.normalizers import Normalizer

LARGEST = 128  # of D and E: what a block of tokens may hold in registers
DTYPES = (torch.float32, torch.bfloat16)


@torch.compiler.disable  # its kernels are compiled already: to be called, not traced
def maclaurin_attention(
    monomials: Monomials,
    x: Tensor,
    y: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    prologues: tuple[Prologue, Prologue],
    constants: Tensor | None,
    normalizer: Normalizer,
    num_keys: Tensor,
    gain: Tensor | None = None,
) -> Tensor:
    """As `attention.fused.maclaurin.maclaurin_attention`, for float32 and bf16; `monomials` in float32.

    x, y and v are read once in each pass but for the keys' state, which reads y and v once per tile of 32 monomials,
    mostly from the cache. Memory besides the result: the denominators [B, H, L] and the state, a few times.
    """
    of_x, of_y = prologues
    packed = pack(monomials)
    state = _State.apply(packed, y, v, key_padding_mask, of_y.unit, of_y.scale, of_y.shift)
    state = monomials.mix(state, gain)
    return _Read.apply(packed, x, constants, state, normalizer, num_keys, v.dtype, of_x.unit, of_x.scale, of_x.shift)


def mean_key(
    monomials: Monomials, y: Tensor, key_padding_mask: Tensor | None, num_keys: Tensor, prologue: Prologue
) -> Tensor:
    """Mean over real keys of what the prologue makes of y, [B, H, 1, D] in float32. Plain torch: it writes the
    prologue's result to memory."""
    return mask_keys(prologue.apply(y.float()), key_padding_mask).sum(dim=2, keepdim=True) / num_keys


class _State(Function):
    """sum_j phi(y_j) [v_j, 1]^T over real keys, [B, H, M, E+1]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        packed: Packed,
        y: Tensor,
        v: Tensor,
        mask: Tensor | None,
        unit: UnitNorm | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        ctx.packed, ctx.unit = packed, unit
        ctx.save_for_backward(y, v, mask, scale, shift)
        return accumulate(Tokens(packed, y, unit, scale, shift, mask), v, None, None, v.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_state: Tensor) -> tuple[Tensor | None, ...]:
        y, v, mask, scale, shift = ctx.saved_tensors
        keys = Tokens(ctx.packed, y, ctx.unit, scale, shift, mask)
        d_v, _ = read(keys, d_state, "none", None, v.dtype, denominators=False)
        d_y, _, d_scale, d_shift = differentiate(keys, d_state, v, None, None, v.dtype)
        return None, d_y, d_v, None, None, d_scale, d_shift


class _Read(Function):
    """(phi(x) . state) over the normaliser's divisor of its last column, [B, H, L, E] in `dtype`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        packed: Packed,
        x: Tensor,
        constants: Tensor | None,
        state: Tensor,
        normalizer: Normalizer,
        num_keys: Tensor,
        dtype: torch.dtype,
        unit: UnitNorm | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        queries = Tokens(packed, x, unit, scale, shift, constants=constants)
        floors = floors_of(normalizer, num_keys)
        out, denominators = read(queries, state, normalizer.policy, floors, dtype, denominators=True)
        ctx.packed, ctx.normalizer, ctx.unit = packed, normalizer, unit
        ctx.save_for_backward(x, constants, state, num_keys, denominators, out, scale, shift)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, constants, state, num_keys, denominators, out, scale, shift = ctx.saved_tensors
        queries = Tokens(ctx.packed, x, ctx.unit, scale, shift, constants=constants)
        inverse, slope = slope_of(ctx.normalizer, denominators, num_keys.float())
        w = weigh(queries, d_out, out, slope)
        d_state = accumulate(queries, d_out, inverse, w, out.dtype)
        d_x, d_constants, d_scale, d_shift = differentiate(queries, state, d_out, inverse, w, out.dtype)
        return None, d_x, d_constants, d_state, None, None, None, None, d_scale, d_shift
