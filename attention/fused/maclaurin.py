"""Owns linear attention over random Maclaurin features on a CPU: block by block, in cache, no feature ever stored.

The plain twin is `attention.feature_maps.maclaurin.Maclaurin.forward` with `attention.linear.linear_attention`.
Legend: B batch, H heads, L length, T tokens of a block, N examples times heads of a block, D head_dim, E columns of v,
M monomials.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable

from attention.fused.blocks import Blocks, Monomials, Prologue, UnitNorm
from attention.normalizers import Normalizer


@torch.compiler.disable  # its loops over blocks write in place: to be called, not traced
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
    """x, y [B, H, L, D], v [B, H, L, E], key_padding_mask [B, L] or None -> [B, H, L, E].

    `prologues`: what is done to queries and keys first. `constants` [B, H, L, 1] multiplies the constant monomial of
    each query (None: 1). `gain` [E] multiplies the columns of the result, by way of the state's, which are fewer.
    Gradients reach x, y, v, constants, gain, scales and shifts; backward evaluates each block again.
    """
    of_x, of_y = prologues
    state = _State.apply(monomials, y, v, key_padding_mask, of_y.unit, of_y.scale, of_y.shift)
    state = monomials.mix(state, gain)
    return _Read.apply(monomials, x, constants, state, normalizer, num_keys, of_x.unit, of_x.scale, of_x.shift)


@torch.compiler.disable  # its loops over blocks write in place: to be called, not traced
def mean_key(
    monomials: Monomials, y: Tensor, key_padding_mask: Tensor | None, num_keys: Tensor, prologue: Prologue
) -> Tensor:
    """Mean over real keys of what the prologue makes of y, [B, H, 1, D]."""
    return _Sum.apply(monomials, y, key_padding_mask, prologue.unit, prologue.scale) / num_keys


class _Sum(Function):
    """Sum over real tokens of scale * unit(y), [B, H, 1, D]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        monomials: Monomials,
        y: Tensor,
        mask: Tensor | None,
        unit: UnitNorm | None,
        scale: Tensor | None,
    ) -> Tensor:
        blocks = Blocks(monomials, y, Prologue(unit, scale, None), backward=False)
        total = y.new_zeros(*y.shape[:2], 1, y.shape[3])
        for block in blocks:
            rows = blocks.prepare(block, blocks.mask(block, mask))
            total[block.examples].flatten(0, 1).add_(rows.sum(dim=2).unsqueeze(1))
        ctx.monomials, ctx.unit = monomials, unit
        ctx.save_for_backward(y, mask, scale)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_total: Tensor) -> tuple[Tensor | None, ...]:
        y, mask, scale = ctx.saved_tensors
        blocks = Blocks(ctx.monomials, y, Prologue(ctx.unit, scale, None), backward=False)
        d_y = torch.empty_like(y)
        for block in blocks:
            hidden = blocks.mask(block, mask)
            blocks.prepare(block, None)
            d_rows = d_total[block.examples].flatten(0, 1).transpose(1, 2).expand_as(blocks.at.rows).contiguous()
            if hidden is not None:
                d_rows.masked_fill_(hidden, 0.0)
            block.write(d_y, blocks.pull_back(block, d_rows))
        return None, d_y, None, None, blocks.d_scale


class _State(Function):
    """sum_j phi(y_j) [v_j, 1]^T over real keys, [B, H, M, E+1]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        monomials: Monomials,
        y: Tensor,
        v: Tensor,
        mask: Tensor | None,
        unit: UnitNorm | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        blocks = Blocks(monomials, y, Prologue(unit, scale, shift), backward=False)
        state = v.new_zeros(*v.shape[:2], monomials.width, v.shape[3])
        total = v.new_zeros(*v.shape[:2], monomials.width, 1)
        for block in blocks:
            phi = blocks.evaluate(block, blocks.mask(block, mask))
            part = state[block.examples].flatten(0, 1)  # [N, M, E], a view
            torch.baddbmm(part, phi, block.of(v), out=part)
            total[block.examples].flatten(0, 1).add_(phi.sum(dim=2, keepdim=True))
        ctx.monomials, ctx.unit = monomials, unit
        ctx.save_for_backward(y, v, mask, scale, shift)
        return torch.cat([state, total], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_state: Tensor) -> tuple[Tensor | None, ...]:
        y, v, mask, scale, shift = ctx.saved_tensors
        blocks = Blocks(ctx.monomials, y, Prologue(ctx.unit, scale, shift), backward=True)
        d_state = d_state.contiguous()
        d_y, d_v = torch.empty_like(y), torch.empty_like(v)
        for block in blocks:
            hidden = blocks.mask(block, mask)
            phi, part = blocks.evaluate(block, hidden), d_state[block.examples].flatten(0, 1)
            block.write(d_v, torch.bmm(part[..., :-1].transpose(1, 2), phi))
            weights = v.new_ones(len(phi), v.shape[3] + 1, phi.shape[2])
            weights[:, :-1] = block.of(v).transpose(1, 2)
            if hidden is not None:
                weights.masked_fill_(hidden, 0.0)
            block.write(d_y, blocks.pull_back(block, blocks.differentiate(part, weights)))
        return None, d_y, d_v, None, None, blocks.d_scale, blocks.d_shift


class _Read(Function):
    """(phi(x) . state) over the normaliser's divisor of its last column, [B, H, L, E]."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        monomials: Monomials,
        x: Tensor,
        constants: Tensor | None,
        state: Tensor,
        normalizer: Normalizer,
        num_keys: Tensor,
        unit: UnitNorm | None,
        scale: Tensor | None,
        shift: Tensor | None,
    ) -> Tensor:
        blocks = Blocks(monomials, x, Prologue(unit, scale, shift), backward=False)
        batch, num_heads, length, _ = x.shape
        out = x.new_empty(batch, length, num_heads, state.shape[3] - 1).transpose(1, 2)  # as the o projection wants it
        denominators = x.new_empty(batch, num_heads, length, 1)
        transposed, num_keys = state.transpose(-2, -1).contiguous(), num_keys.expand(-1, num_heads, 1, 1).flatten(0, 1)
        for block in blocks:
            part = transposed[block.examples].flatten(0, 1)
            sums = torch.bmm(part, blocks.evaluate(block, None, constants))  # [N, E+1, T]
            values, denominator = sums[:, :-1], sums[:, -1:]
            block.write(denominators, denominator)
            heads = slice(block.examples.start * num_heads, block.examples.stop * num_heads)
            block.write(out, values.div_(normalizer.divisor(denominator, num_keys[heads])))
        ctx.monomials, ctx.normalizer, ctx.unit = monomials, normalizer, unit
        ctx.save_for_backward(x, constants, state, num_keys, denominators, out, scale, shift)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, constants, state, num_keys, denominators, out, scale, shift = ctx.saved_tensors
        blocks = Blocks(ctx.monomials, x, Prologue(ctx.unit, scale, shift), backward=True)
        inverse, slope = slope_of(ctx.normalizer, denominators, num_keys.view(*x.shape[:2], 1, 1))
        d_x, d_state = torch.empty_like(x), torch.zeros_like(state)
        d_constants = None if constants is None else torch.empty_like(constants)
        for block in blocks:
            phi = blocks.evaluate(block, None, constants)
            grad = block.of(d_out)  # [N, T, E]
            weights = x.new_empty(len(phi), state.shape[3], phi.shape[2])
            torch.mul(grad.transpose(1, 2), block.of(inverse).transpose(1, 2), out=weights[:, :-1])
            weights[:, -1] = (grad * block.of(out)).sum(dim=-1).mul_(block.of(slope)[..., 0])
            part = d_state[block.examples].flatten(0, 1)
            torch.baddbmm(part, phi, weights.transpose(1, 2), out=part)
            d_rows = blocks.differentiate(state[block.examples].flatten(0, 1), weights)
            block.write(d_x, blocks.pull_back(block, d_rows))
            if d_constants is not None:
                block.write(d_constants, blocks.at.d_ones)
        return None, d_x, d_constants, d_state, None, None, None, blocks.d_scale, blocks.d_shift


def slope_of(normalizer: Normalizer, denominators: Tensor, num_keys: Tensor) -> tuple[Tensor, Tensor]:
    """1 / g and -g' / g of the divisor g at the denominators, all [B, H, L, 1]: d out = (1/g) d num - (g'/g) out d den."""
    with torch.enable_grad():
        point = denominators.detach().requires_grad_()
        divisor = normalizer.divisor(point, num_keys)
        (derivative,) = (
            torch.autograd.grad(divisor.sum(), point) if divisor.requires_grad else (torch.zeros_like(point),)
        )
    inverse = divisor.detach().reciprocal()
    return inverse, -inverse * derivative
