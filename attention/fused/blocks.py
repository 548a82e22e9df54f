"""Owns the blocks in which Maclaurin monomials are evaluated on a CPU, and the way of their gradients back to x.

Legend: B batch, H heads, L length, N examples times heads of a block, T tokens of a block, D head_dim, M monomials,
C projections.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_BLOCK_BYTES = 2**22  # of features and projections of one block: about what the cores' own caches hold

_STEP = 64  # lengths of blocks are multiples of it, for the sake of vector instructions


@dataclass(frozen=True)
class Monomials:
    """phi(x).phi(y) = constant + x^T linear y + sum_i psi_i(x) psi_i(y), psi_i a product of rows of matrix @ x.

    Factor j of the products is the j-th group of levels[j] rows; levels descend and the first two are equal, because
    random features of degree 0 and 1 need no projections: their sums are `constant` and `linear`.
    """

    constant: float | Tensor
    linear: Tensor  # [D, D]
    matrix: Tensor  # [C, D]
    levels: tuple[int, ...]

    @property
    def width(self) -> int:
        """M: rows of a block of monomials (1, x, psi(x))."""
        return 1 + self.linear.shape[0] + (self.levels[0] if self.levels else 0)

    def mix(self, state: Tensor, gain: Tensor | None) -> Tensor:
        """The coefficients of the monomials and the `gain` [E] of the result's columns, applied to a state [B, H, M, E+1]
        instead of to every token."""
        first, rest = state[..., :1, :] * self.constant, state[..., 1 + self.linear.shape[0] :, :]
        state = torch.cat([first, self.linear @ state[..., 1 : 1 + self.linear.shape[0], :], rest], dim=-2)
        return state if gain is None else state * torch.cat([gain, gain.new_ones(1)])


@dataclass(frozen=True)
class UnitNorm:
    """x -> x / max(|x|, eps), after the mean over D is taken off where `centre` says so."""

    eps: float
    centre: bool


@dataclass(frozen=True)
class Prologue:
    """x -> scale * unit(x) - shift, on the way into a block."""

    unit: UnitNorm | None
    scale: Tensor | None  # [H, 1, 1]
    shift: Tensor | None  # [B, H, 1, D]

    def apply(self, x: Tensor) -> Tensor:
        """The definition, on the whole of x [B, H, L, D]."""
        if self.unit is not None:
            x = x - x.mean(dim=-1, keepdim=True) if self.unit.centre else x
            x = x / x.norm(dim=-1, keepdim=True).clamp_min(self.unit.eps)
        x = x if self.scale is None else x * self.scale
        return x if self.shift is None else x - self.shift


class _Buffers:
    """The memory of one block and all views of it, made once: contiguous, so that every product writes in place."""

    def __init__(self, monomials: Monomials, like: Tensor, shape: tuple[int, int], backward: bool) -> None:
        """`shape`: examples times heads N, and tokens T of the block."""
        columns, levels, dim = len(monomials.matrix), monomials.levels, monomials.matrix.shape[1]

        def buffer(rows: int) -> Tensor:
            return like.new_empty(shape[0], rows, shape[1])

        def factors_of(rows: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
            return list(rows.split(sizes, dim=1)) if sizes else []

        self.matrix = monomials.matrix.expand(shape[0], -1, -1)
        self.phi, self.projections = buffer(monomials.width), buffer(columns)  # [N, M, T], [N, C, T]
        self.ones, self.rows, self.products = self.phi.split([1, dim, monomials.width - 1 - dim], dim=1)
        self.factors = factors_of(self.projections, levels)
        # the first rows of each factor but the first, as many as there are of the next one
        self.heads = [f[:, :m] for f, m in zip(self.factors[1:], levels[2:], strict=False)]
        if not backward:
            return
        self.kept = factors_of(buffer(sum(levels[2:])), levels[2:])
        self.d_phi, self.d_projections = buffer(monomials.width), buffer(columns)
        self.d_ones, self.d_rows, self.d_products = self.d_phi.split([1, dim, monomials.width - 1 - dim], dim=1)
        self.d_factors = factors_of(self.d_projections, levels)
        self.d_heads = [f[:, :m] for f, m in zip(self.d_factors[1:], levels[2:], strict=False)]
        self.d_x = buffer(dim)


@dataclass(frozen=True)
class Block:
    """Some examples, and some of their positions."""

    examples: slice
    tokens: slice

    def of(self, x: Tensor) -> Tensor:
        """[B, H, L, D] -> [N, T, D]: a view where the block has one example, else a copy."""
        return x[self.examples, :, self.tokens].flatten(0, 1)

    def write(self, x: Tensor, rows: Tensor) -> None:
        """rows [N, D, T] into x [B, H, L, D]."""
        target = x[self.examples, :, self.tokens]
        target.copy_(rows.unflatten(0, target.shape[:2]).transpose(2, 3))


class Blocks:
    """Evaluates the monomials of x block by block, and takes their gradients back to x."""

    def __init__(self, monomials: Monomials, x: Tensor, prologue: Prologue, backward: bool) -> None:
        self.monomials, self.x, self.prologue, self.backward = monomials, x, prologue, backward
        rows = (len(monomials.matrix) + monomials.width) * (2 if backward else 1)
        self.budget = max(_STEP, _BLOCK_BYTES // (rows * x.shape[1] * x.element_size()) // _STEP * _STEP)  # tokens
        self.d_scale = None if prologue.scale is None else torch.zeros_like(prologue.scale)
        self.d_shift = None if prologue.shift is None else torch.zeros_like(prologue.shift)

    def __iter__(self) -> Iterator[Block]:
        """Whole examples while several fit, else pieces of one; all blocks of one size follow each other."""
        batch, num_heads, length, _ = self.x.shape
        examples, tokens = max(1, min(batch, self.budget // length)), min(self.budget, length)
        for several in _pieces(batch, examples, 1):
            for some in _pieces(length, tokens, _STEP):
                shape = (several.step * num_heads, some.step)
                self.at = _Buffers(self.monomials, self.x, shape, self.backward)
                for b in range(several.start, several.stop, several.step):
                    for t in range(some.start, some.stop, some.step):
                        yield Block(slice(b, b + several.step), slice(t, t + some.step))

    def evaluate(self, block: Block, mask: Tensor | None, constants: Tensor | None = None) -> Tensor:
        """The rows (1 or the constants, x, psi(x)) of a block, x after the prologue, [N, M, T]; all 0 where masked."""
        at = self.at
        if constants is None:
            at.ones.fill_(1.0)
        else:
            at.ones.copy_(block.of(constants).transpose(1, 2))
        self.prepare(block, mask)
        if mask is not None:
            at.ones.masked_fill_(mask, 0.0)
        if at.factors:
            torch.bmm(at.matrix, at.rows, out=at.projections)
            for j in reversed(range(len(at.heads))):  # factors[j] becomes P_j P_{j+1} ..., j >= 1
                if self.backward:
                    at.kept[j].copy_(at.heads[j])
                at.heads[j].mul_(at.factors[j + 2])
            torch.mul(at.factors[0], at.factors[1], out=at.products)
        return at.phi

    def prepare(self, block: Block, mask: Tensor | None) -> Tensor:
        """Rows of the prologue's result, [N, D, T], 0 where masked."""
        unit, rows = self.prologue.unit, self.at.rows
        rows.copy_(block.of(self.x).transpose(1, 2))
        if unit is not None:
            if unit.centre:
                rows.sub_(rows.mean(dim=1, keepdim=True))
            # vector_norm over this dimension takes 20 times as long
            self.norms = rows.square().sum(dim=1, keepdim=True).sqrt_().clamp_min_(unit.eps)  # [N, 1, T]
            rows.div_(self.norms)
        if self.prologue.scale is not None:
            rows.mul_(self._scales(block))
        if self.prologue.shift is not None:
            rows.sub_(self._shifts(block))
        return rows if mask is None else rows.masked_fill_(mask, 0.0)

    def _scales(self, block: Block) -> Tensor:
        """[N, 1, 1]."""
        return self.prologue.scale.repeat(block.examples.stop - block.examples.start, 1, 1)

    def _shifts(self, block: Block) -> Tensor:
        """[N, D, 1]."""
        return self.prologue.shift[block.examples].flatten(0, 1).transpose(1, 2)

    def pull_back(self, block: Block, d_rows: Tensor) -> Tensor:
        """Gradient of x as rows [N, D, T] from that of the prologue's result, which is changed; `prepare` must have run
        on this block, and its rows are spent. Those of scale and shift add up in `d_scale` and `d_shift`."""
        unit, rows, heads = self.prologue.unit, self.at.rows, (-1, self.x.shape[1])
        if self.prologue.shift is not None:
            self.d_shift[block.examples] -= d_rows.sum(dim=2).unflatten(0, heads).unsqueeze(2)
            rows.add_(self._shifts(block))
        if self.prologue.scale is not None:
            scales = self._scales(block)
            rows.div_(scales)
            self.d_scale += (
                torch.linalg.vecdot(rows.flatten(1), d_rows.flatten(1)).view(heads).sum(dim=0)[:, None, None]
            )
            d_rows.mul_(scales)
        if unit is not None:
            along = (rows * d_rows).sum(dim=1, keepdim=True).mul_(self.norms > unit.eps)
            d_rows.addcmul_(rows, along, value=-1.0).div_(self.norms)
            if unit.centre:
                d_rows.sub_(d_rows.mean(dim=1, keepdim=True))
        return d_rows

    def mask(self, block: Block, mask: Tensor | None) -> Tensor | None:
        """[B, L] -> [N, 1, T]."""
        if mask is None:
            return None
        return mask[block.examples, block.tokens].repeat_interleave(self.x.shape[1], dim=0).unsqueeze(1)

    def differentiate(self, state: Tensor, weights: Tensor) -> Tensor:
        """After `evaluate`: the gradient of x as rows [N, D, T], that of the monomials being state [N, M, E+1] @
        weights [N, E+1, T]. The gradient of the constant monomial stays in `at.d_ones`."""
        at = self.at
        torch.bmm(state, weights, out=at.d_phi)
        if not at.factors:
            return at.d_rows
        torch.mul(at.d_products, at.factors[1], out=at.d_factors[0])
        torch.mul(at.d_products, at.factors[0], out=at.d_factors[1])
        for j, head in enumerate(at.d_heads):
            torch.mul(head, at.kept[j], out=at.d_factors[j + 2])
            head.mul_(at.factors[j + 2])
        return torch.bmm(at.matrix.transpose(1, 2), at.d_projections, out=at.d_x).add_(at.d_rows)


def _pieces(total: int, size: int, step: int) -> list[slice]:
    """range(total) as one run of equal pieces, multiples of `step` up to `size`, and the shorter piece that remains."""
    size = min(size, -(-total // -(-total // size) // step) * step)  # as few pieces, of nearly the same size
    whole = total // size * size
    return [slice(0, whole, size)] + ([slice(whole, total, total - whole)] if whole < total else [])
