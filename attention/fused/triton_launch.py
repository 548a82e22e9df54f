"""Owns the launches of the GPU kernels: monomials packed into tiles, shapes padded, pieces of L summed in a fixed order.

Importing this file needs triton. Legend: B batch, H heads, N = B H, L length, D head_dim, E columns of v, M monomials.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional

from attention.fused.blocks import Monomials, UnitNorm
from attention.fused.triton_kernels import accumulate_kernel, differentiate_kernel, read_kernel, slope_kernel
from attention.normalizers import Normalizer

_ROWS = 32  # monomials of a tile: a multiple of 16, which tensor cores ask for; wider tiles pad more products with ones
_PROGRAMS = 1024  # of `accumulate`, at least: several for each processor of a large GPU, whatever B and H are


@dataclass(frozen=True)
class Packed:
    """The monomials (1, x, psi(x)) in tiles of _ROWS. Each is a product of projections plus biases: 1 has the bias 1
    alone, x the rows of the identity; a factor that a product lacks, beside longer ones of its tile, is 0 . x + 1."""

    matrix: Tensor  # [K, DIM, _ROWS], K factors of tiles
    bias: Tensor  # [K, _ROWS]
    starts: Tensor  # [tiles + 1] int32: the first factor of each tile
    width: int  # M

    @property
    def tiles(self) -> int:
        return len(self.starts) - 1


def pack(monomials: Monomials) -> Packed:
    matrix = monomials.matrix.float()
    dim = matrix.shape[1]
    index, bias, starts = _layout(monomials.levels, dim, matrix.device)
    source = torch.cat([matrix, torch.eye(dim, device=matrix.device), matrix.new_zeros(1, dim)])
    tiles = functional.pad(source[index], (0, _padded(dim) - dim))  # [K, _ROWS, DIM]
    return Packed(tiles.transpose(1, 2).contiguous(), bias, starts, monomials.width)


@lru_cache(maxsize=256)
def _layout(levels: tuple[int, ...], dim: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Which row of (matrix, identity, 0) each factor of each monomial is [K, _ROWS], its bias, and `Packed.starts`."""
    first = [sum(levels[:j]) for j in range(len(levels))]
    identity = sum(levels)
    zero = identity + dim
    products = [[first[j] + i for j, size in enumerate(levels) if size > i] for i in range(levels[0] if levels else 0)]
    monomials = [[], *([identity + d] for d in range(dim)), *products]  # the rows whose product each is
    index, bias, starts = [], [], [0]
    for at in range(0, len(monomials), _ROWS):
        tile = monomials[at : at + _ROWS]
        missing = _ROWS - len(tile)
        for j in range(max(1, *(len(factors) for factors in tile))):
            index.append([f[j] if j < len(f) else zero for f in tile] + [zero] * missing)
            bias.append([float(j >= len(f)) for f in tile] + [0.0] * missing)
        starts.append(len(index))
    tensors = torch.tensor(index), torch.tensor(bias), torch.tensor(starts, dtype=torch.int32)
    return tuple(x.to(device) for x in tensors)  # type: ignore[return-value]


@dataclass(frozen=True)
class Tokens:
    """The queries or the keys: what is expanded, and what is done to it first."""

    packed: Packed
    x: Tensor  # [B, H, L, D]
    unit: UnitNorm | None
    scale: Tensor | None  # [H, 1, 1]
    shift: Tensor | None  # [B, H, 1, D]
    hidden: Tensor | None = None  # [B, L] bool
    constants: Tensor | None = None  # [B, H, L, 1], in place of the monomial 1

    def arguments(self) -> dict[str, Any]:
        """What every kernel takes."""
        batch, num_heads, length, width = self.x.shape
        x = rows(self.x)
        return {
            "x": x, "hidden": None if self.hidden is None else self.hidden.contiguous().view(torch.uint8),
            "constants": _flat(self.constants), "scale": _flat(self.scale), "shift": _flat(self.shift),
            "matrix": self.packed.matrix, "bias": self.packed.bias, "starts": self.packed.starts,
            "xb": x.stride(0), "xh": x.stride(1), "xl": x.stride(2), "num_examples": batch, "num_heads": num_heads,
            "length": length, "tiles": self.packed.tiles, "width": width,
            "eps": 0.0 if self.unit is None else self.unit.eps,
            "UNIT": 0 if self.unit is None else 1 + self.unit.centre,
        }  # fmt: skip

    def sizes(self, columns: int, dtype: torch.dtype) -> dict[str, Any]:
        """`dtype`: of v, which says how exact the products have to be."""
        largest = max(_padded(self.x.shape[3]), _padded(columns))
        return {
            "PRECISION": _precision(dtype), "ROWS": _ROWS, "DIM": _padded(self.x.shape[3]), "COLUMNS": _padded(columns),
            # what ptxas fits into the registers of compute capability 9.0 without spilling, but for float32 above 64
            "TOKENS": 32 if largest > 64 else 64, "num_warps": 8 if largest > 64 else 4, "num_stages": 2,
            "enable_fp_fusion": True,  # a b + c rounded once; releases of triton differ in what they do unasked
        }  # fmt: skip


def accumulate(of: Tokens, u: Tensor, inverse: Tensor | None, w: Tensor | None, dtype: torch.dtype) -> Tensor:
    """sum_l phi(x_l) (inverse_l u_l, w_l)^T over real tokens: u [B, H, L, E] -> [B, H, M, E+1] in float32."""
    batch, num_heads, length, columns = u.shape
    sizes, given, tiles = of.sizes(columns, dtype), rows(u), of.packed.tiles
    most = triton.cdiv(length, sizes["TOKENS"])
    splits = min(most, triton.cdiv(_PROGRAMS, batch * num_heads * tiles))
    piece = triton.cdiv(most, splits) * sizes["TOKENS"]
    splits = triton.cdiv(length, piece)
    sums = u.new_empty(splits, batch, num_heads, tiles * _ROWS, sizes["COLUMNS"], dtype=torch.float32)
    totals = u.new_empty(splits, batch, num_heads, tiles * _ROWS, dtype=torch.float32)
    with torch.cuda.device_of(u):
        accumulate_kernel[(tiles * batch * num_heads * splits,)](
            **of.arguments(), u=given, inverse=_flat(inverse), w=_flat(w), sums=sums, totals=totals,
            ub=given.stride(0), uh=given.stride(1), ul=given.stride(2), num_columns=columns, piece=piece, **sizes,
        )  # fmt: skip
    state = torch.cat([sums.sum(dim=0)[..., :columns], totals.sum(dim=0).unsqueeze(-1)], dim=-1)
    return state[..., : of.packed.width, :]


def read(
    of: Tokens, state: Tensor, policy: str, floors: Tensor | None, dtype: torch.dtype, denominators: bool
) -> tuple[Tensor, Tensor | None]:
    """phi(x) . state [B, H, M, E+1] over the policy's divisor [B, H, L, E] in `dtype`; the denominators [B, H, L, 1]."""
    batch, num_heads, length, _ = of.x.shape
    columns = state.shape[3] - 1
    sizes = of.sizes(columns, dtype)
    # as the o projection wants it
    out = state.new_empty(batch, length, num_heads, columns, dtype=dtype).transpose(1, 2)
    found = state.new_empty(batch, num_heads, length, 1, dtype=torch.float32) if denominators else None
    with torch.cuda.device_of(out):
        read_kernel[(batch * num_heads * triton.cdiv(length, sizes["TOKENS"]),)](
            **of.arguments(), **_pad(state, of.packed.tiles, sizes["COLUMNS"]), floors=floors, out=out,
            denominators=found, ob=out.stride(0), oh=out.stride(1), ol=out.stride(2), num_columns=columns,
            POLICY=policy, **sizes,
        )  # fmt: skip
    return out, found


def differentiate(
    of: Tokens, state: Tensor, u: Tensor, inverse: Tensor | None, w: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, constants, scale and shift where that of phi(x_l) is state (inverse_l u_l, w_l)."""
    batch, num_heads, length, width = of.x.shape
    columns = u.shape[3]
    sizes, given = of.sizes(columns, dtype), rows(u)
    blocks = triton.cdiv(length, sizes["TOKENS"])
    d_x = rows(torch.empty_like(of.x))
    d_constants = None if of.constants is None else torch.empty_like(of.constants, dtype=torch.float32).contiguous()
    d_scale = None if of.scale is None else state.new_empty(blocks, batch, num_heads)
    d_shift = None if of.shift is None else state.new_empty(blocks, batch, num_heads, 1, width)
    with torch.cuda.device_of(u):
        differentiate_kernel[(batch * num_heads * blocks,)](
            **of.arguments(), **_pad(state, of.packed.tiles, sizes["COLUMNS"]), u=given, inverse=_flat(inverse),
            w=_flat(w), d_x=d_x, d_constants=d_constants, d_scale=d_scale, d_shift=d_shift, ub=given.stride(0),
            uh=given.stride(1), ul=given.stride(2), gb=d_x.stride(0), gh=d_x.stride(1), gl=d_x.stride(2),
            num_columns=columns, **sizes,
        )  # fmt: skip
    if d_scale is not None:
        d_scale = d_scale.sum(dim=(0, 1))[:, None, None]
    return d_x, d_constants, d_scale, None if d_shift is None else d_shift.sum(dim=0)


def weigh(of: Tokens, d_out: Tensor, out: Tensor, slope: Tensor) -> Tensor:
    """slope (d_out . out), [B, H, L, 1]: the gradient of the denominators."""
    batch, num_heads, length, columns = out.shape
    sizes, left, right, result = of.sizes(columns, out.dtype), rows(d_out), rows(out), torch.empty_like(slope)
    with torch.cuda.device_of(out):
        slope_kernel[(batch * num_heads * triton.cdiv(length, sizes["TOKENS"]),)](
            left, right, slope, result, *left.stride()[:3], *right.stride()[:3], batch, num_heads, length, columns,
            COLUMNS=sizes["COLUMNS"], TOKENS=sizes["TOKENS"], num_warps=sizes["num_warps"],
            enable_fp_fusion=True,
        )  # fmt: skip
    return result


def floors_of(normalizer: Normalizer, num_keys: Tensor) -> Tensor:
    """The constant of `divisor` for each example, [B]."""
    num_keys = num_keys.flatten().float()
    if normalizer.policy == "sum":
        return torch.full_like(num_keys, torch.finfo(torch.float32).tiny)
    return num_keys * normalizer.constant if normalizer.per_key else torch.full_like(num_keys, normalizer.constant)


def rows(x: Tensor) -> Tensor:
    """x with channels next to each other, as the kernels read them: a copy where they are not."""
    return x if x.stride(3) == 1 else x.contiguous()


def _pad(state: Tensor, tiles: int, columns: int) -> dict[str, Tensor]:
    """[B, H, M, E+1] -> the sums [B, H, R, COLUMNS] and totals [B, H, R] of whole tiles."""
    missing = tiles * _ROWS - state.shape[2]
    sums = functional.pad(state[..., :-1], (0, columns - state.shape[3] + 1, 0, missing))
    return {"sums": sums.contiguous(), "totals": functional.pad(state[..., -1], (0, missing)).contiguous()}


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _padded(size: int) -> int:
    """Tensor cores ask for 16 at least, block shapes for powers of two."""
    return max(16, triton.next_power_of_2(size))


def _precision(dtype: torch.dtype) -> str:
    """Three products of tf32 parts are about as exact as float32. bf16 inputs carry fewer digits than tf32 keeps. AMD
    GPUs have neither."""
    if torch.version.hip:
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"
