"""Owns random Maclaurin features: an unbiased estimate of any dot-product kernel K(t) = sum_n a_n t^n, a_n >= 0.

Kar and Karnick, arXiv 1201.6530; as an attention: Macformer, arXiv 2408.11656, and SchoenbAt, arXiv 2505.12252.
Legend: B batch, H heads, L length, D head_dim, F num_features.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attention.base import Description, HeadShape, mean_over_keys
from attention.feature_maps.base import FeatureMap, Features
from attention.feature_maps.degrees import DegreeLaw
from attention.feature_maps.exact_part import check_width, exact_rows, exact_width
from attention.feature_maps.levels import count_levels, fold, sample_levels
from attention.feature_maps.symmetric_square import num_pairs
from attention.fused.blocks import Monomials, Prologue, UnitNorm
from attention.fused.engines import engine_for
from attention.kernels import Kernel
from attention.normalizers import Normalizer
from attention.projections.base import Projection
from attention.projections.draws import check_factors


class Maclaurin(FeatureMap):
    """phi(x) with E[phi(x).phi(y)] = K(x.y / sqrt(D)).

    A random feature of degree n is sqrt(w_n) prod_{j<=n} omega_j.x, its weight w_n and the number of such features
    set by `degree_law`; queries and keys share the omegas. Degrees 0..exact_degree are not estimated but expanded:
    sqrt(a_0); sqrt(a_1) x_c; sqrt(a_2) x_c^2 and sqrt(2 a_2) x_c x_e for each pair.
    """

    sign = "signed"
    description = Description(paper="2505.12252", exact=False, complexity="L F D")

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        kernel: Kernel,
        num_features: int,
        exact_degree: int,
        degree_law: DegreeLaw,
        projection: Projection,
        centred: bool,
    ) -> None:
        """`num_features`: the whole width F, exact part included. `exact_degree`: -1 (nothing is exact) to 2; the
        published code has 0. With F equal to the width of the exact part the map is the truncated series itself.
        `centred`: expand about each query's argument with the mean key instead of about 0 (see `prepare`)."""
        super().__init__()
        check_factors(projection)
        if centred and exact_degree < 0:
            raise ValueError("feature_map.centred needs the constant of each query: set exact_degree to 0, 1 or 2")
        self.centred = centred
        self.dot_kernel, self.exact_degree, self.projection = kernel, exact_degree, projection
        self.head_dim = shape.head_dim
        num_random = num_features - exact_width(exact_degree, shape.head_dim)
        check_width(num_features, num_random, exact_degree, shape.head_dim, projection.is_complex)
        self._num_outputs = num_features
        self.random = num_random > 0
        self.law = None
        counts: Mapping[int, int] = {}
        if self.random:
            draws = num_random // 2 if projection.is_complex else num_random
            self.law = degree_law.draw(kernel, exact_degree + 1, draws, shape.head_dim, generator)
            counts = dict(sorted(self.law.counts.items(), reverse=True))
        degrees = [n for n, count in counts.items() for _ in range(count)]
        self.register_buffer("degrees", torch.tensor(degrees, dtype=torch.long))  # [R], descending
        weights = [self.law.weights[n] ** 0.5 for n in degrees]
        self.register_buffer("weights", torch.tensor(weights))  # [R]
        signs = sample_levels(projection, counts, shape.head_dim, generator)
        self.register_buffer("signs", signs)  # [C, D] or [2C, D]
        self.levels = count_levels(self.degrees)
        self.register_load_state_dict_pre_hook(_adopt_draw)

    @property
    def num_outputs(self) -> int:
        return self._num_outputs

    @property
    def num_projections(self) -> int:
        """Rows of the matrix that the fused form multiplies every token with: degree 2 and above."""
        return sum(self.levels[1:]) + (self.levels[1] if len(self.levels) > 1 else 0)

    def prepare(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Tensor | None:
        """The mean key m [B, H, 1, D], when centred. With t0 = q.m / sqrt(D) and s = q.(k - m) / sqrt(D) the kernel is
        K(t0 + s), in the ratio the same as c + sum_{n>=1} a_n (s/u)^n: queries become q/u with the constant c, keys
        k - m. Weights keep their meaning and the arguments lose what all keys have in common. m keeps its gradient."""
        return mean_over_keys(k, key_padding_mask) if self.centred else None

    def recentre(self, x: Tensor, is_query: bool, mean: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The vectors that are expanded and, where it is not sqrt(a_0), the constant [B, H, L, 1] of the queries."""
        if mean is None or (is_query and self.dot_kernel.multiplicative):
            return x, None
        if not is_query:
            return x - mean, None
        u, constant = self.dot_kernel.recentre(x @ mean.transpose(-2, -1) / math.sqrt(self.head_dim))  # [B, H, L, 1]
        return x / u, constant

    def forward(self, x: Tensor, is_query: bool, prepared: Any = None) -> Features:
        """All features are kept as rows [F, L] until the end: each step then works on contiguous memory."""
        x, constant = self.recentre(x, is_query, prepared)
        rows = x.transpose(-2, -1)  # [B, H, D, L]
        constant = None if constant is None else constant.transpose(-2, -1)
        exact = exact_rows(rows * self.head_dim**-0.25, self.exact_degree, self.dot_kernel.coefficient, constant)
        pieces = self._random_rows(rows) + exact
        return Features(torch.cat(pieces, dim=-2).transpose(-2, -1))

    def fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_padding_mask: Tensor | None,
        normalizer: Normalizer,
        num_keys: Tensor,
        unit: UnitNorm | None = None,
        scale: Tensor | None = None,
        gain: Tensor | None = None,
    ) -> Tensor | None:
        """The same function in one op, for real projections and exact degrees below 2, where `engine_for` knows one.

        `unit` and `scale` [H, 1, 1]: q and k become scale * unit(q) and scale * unit(k) on the way in. `gain` [D]
        multiplies the channels of the result.
        """
        engine = None if self.exact_degree > 1 or self.projection.is_complex else engine_for(q, v)
        if engine is None:
            return None
        own_constants = self.centred and not self.dot_kernel.multiplicative
        plain, dtype = Prologue(unit, scale, None), torch.promote_types(q.dtype, torch.float32)
        if not engine.takes_bf16:
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        with torch.autocast(q.device.type, enabled=False):
            monomials, prologues, constants = self.monomials(dtype, own_constants), (plain, plain), None
            if self.centred:
                mean = engine.mean_key(monomials, k, key_padding_mask, num_keys, plain)
                prologues = plain, Prologue(unit, scale, mean)
                if own_constants:
                    q, constants = self.recentre(plain.apply(q.to(dtype)), True, mean)
                    prologues = Prologue(None, None, None), prologues[1]
            return engine.attend(monomials, q, k, v, key_padding_mask, prologues, constants, normalizer, num_keys, gain)

    def monomials(self, dtype: torch.dtype, own_constants: bool) -> Monomials:
        """The map with its features of degree 0 and 1 summed up: phi(x).phi(y) needs their sum alone, a number and a
        bilinear form. `own_constants`: the queries bring c, which replaces a_0."""
        a, scale = self.dot_kernel.coefficient, self.head_dim**-0.5
        first, second = (*self.levels[:2], 0, 0)[:2]  # random features of degree >= 1, >= 2
        weights, signs = self.weights.to(dtype), self.signs.to(dtype)
        # a tensor: to make it a number would wait for a GPU
        constant = weights[first:].square().sum() + (a(0) if self.exact_degree >= 0 else 0.0)
        single = signs[second:first] * weights[second:first, None]
        linear = single.T @ single * scale
        if self.exact_degree >= 1:
            linear = linear + torch.eye(self.head_dim, dtype=dtype, device=signs.device) * (a(1) * scale)
        products = [signs[:second] * weights[:second, None], signs[first:]] if second else [signs[:0]]
        levels = (second, *self.levels[1:]) if second else ()
        return Monomials(1.0 if own_constants else constant, linear, torch.cat(products) * scale**0.5, levels)

    def _random_rows(self, rows: Tensor) -> list[Tensor]:
        """One product for all projections, then products over the levels: level j multiplies the first m_j features."""
        if not self.random:
            return []
        weights = self.weights.to(rows.dtype)
        constants = weights[sum(self.levels[:1]) :, None]  # features of degree 0
        pieces = [constants.expand(*rows.shape[:-2], -1, rows.shape[-1])] if len(constants) else []
        if self.levels:
            matrix = self._matrix(weights)
            levels = matrix.expand(*rows.shape[:-2], -1, -1) @ rows  # [B, H, C, L]
            if self.projection.is_complex:
                levels = torch.complex(*levels.chunk(2, dim=-2))
            pieces = [*fold(levels.split(self.levels, dim=-2)), *pieces]
        if self.projection.is_complex:
            pieces = [p.real for p in pieces] + [p.imag if p.is_complex() else torch.zeros_like(p) for p in pieces]
        return pieces

    def _matrix(self, weights: Tensor) -> Tensor:
        """The signs [C, D] with 1/D^(1/4) in every factor and a feature's weight in its first."""
        scale = weights.new_full((sum(self.levels),), self.head_dim**-0.25)
        scale[: self.levels[0]] *= weights[: self.levels[0]]
        if self.projection.is_complex:
            scale = scale.repeat(2)
        return self.signs.to(weights.dtype) * scale[:, None]

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.head_dim**-0.25

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """E[phi(x).phi(y)] over all draws: the exact degrees plus the estimated ones (shrunk, if the law shrinks)."""
        t = (x * y).sum(dim=-1)
        return self.dot_kernel.series(t, range(self.exact_degree + 1)) + self._random_mean(t)

    def _random_mean(self, t: Tensor) -> Tensor:
        total = torch.zeros_like(t)
        for n, mean in self.law.expected.items() if self.law else ():
            total = total + mean * self.law.weights[n] * t**n
        return total

    def second_moment(self, x: Tensor, y: Tensor) -> Tensor:
        """Of one random feature, scaled so that its own mean is the random part of `kernel`; the exact part has none.

        With stratified counts one feature means one whose degree is picked with probability counts[n] / R.
        """
        assert self.law is not None, "a map without random features has no second moment"
        total = torch.zeros_like(x[..., 0])
        for n, mean in self.law.expected.items():
            total = total + mean * self.law.weights[n] ** 2 * self.projection.moment(n, x, y)
        return total * sum(self.law.expected.values())

    def variance(self, x: Tensor, y: Tensor) -> Tensor:
        """Var[phi(x).phi(y)] of the whole estimate over all draws of degrees and projections.

        Errors: NotImplementedError for structured rows under iid degrees, which has no short closed form.
        """
        t = (x * y).sum(dim=-1)
        if self.law is None:
            return torch.zeros_like(t)
        size = self.projection.block(self.head_dim)
        if self.law.iid:
            if size > 1:
                raise NotImplementedError("variance() needs independent rows, or stratified degrees")
            return (self.second_moment(x, y) - self._random_mean(t) ** 2) / sum(self.law.expected.values())
        total = torch.zeros_like(t)
        for n, count in self.law.counts.items():
            pairs = count // size * size * (size - 1) + count % size * (count % size - 1)  # ordered, in one block
            own = count * (self.projection.moment(n, x, y) - t ** (2 * n))
            shared = pairs * (self.projection.pair_moment(n, x, y) - t ** (2 * n))
            total = total + self.law.weights[n] ** 2 * (own + shared)
        return total


def maclaurin_features_naive(feature_map: Maclaurin, x: Tensor) -> Tensor:
    """The definition, feature by feature: x [B, H, L, D] -> [B, H, L, F] in the order of `Maclaurin.forward`."""
    x = x * feature_map.head_dim**-0.25
    signs = feature_map.signs.to(x.dtype)
    if feature_map.projection.is_complex:
        signs = torch.complex(*signs.chunk(2))
    columns = []
    for i, degree in enumerate(feature_map.degrees.tolist()):
        column = torch.ones_like(x[..., 0]).to(signs.dtype)
        for j in range(degree):
            row = signs[sum(feature_map.levels[:j]) + i]
            column = column * (x * row).sum(dim=-1)
        columns.append(column * feature_map.weights[i].to(x.dtype))
    if feature_map.projection.is_complex:
        columns = [c.real for c in columns] + [c.imag for c in columns]
    a = feature_map.dot_kernel.coefficient
    dim = feature_map.head_dim
    if feature_map.exact_degree >= 0:
        columns.append(torch.full_like(x[..., 0], math.sqrt(a(0))))
    if feature_map.exact_degree >= 1:
        columns += [math.sqrt(a(1)) * x[..., c] for c in range(dim)]
    if feature_map.exact_degree >= 2:
        pairs = [(c, (c + shift) % dim) for shift in range(dim) for c in range(dim)][: num_pairs(dim)]
        columns += [math.sqrt(a(2) * (1 if c == e else 2)) * x[..., c] * x[..., e] for c, e in pairs]
    return torch.stack(columns, dim=-1)


def _adopt_draw(module: Maclaurin, state_dict: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """A checkpoint may hold another draw of iid degrees, hence another number of signs: make room for it."""
    if f"{prefix}degrees" in state_dict and f"{prefix}signs" in state_dict:
        module.levels = count_levels(state_dict[f"{prefix}degrees"])
        module.signs = module.signs.new_empty(state_dict[f"{prefix}signs"].shape)
