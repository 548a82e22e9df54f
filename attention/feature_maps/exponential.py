"""Owns the positive random features of the softmax kernel: FAVOR+, FAVOR++, FAVOR# and their relatives in one class.

Legend: B batch, H heads, L length, D head_dim, M num_features (random vectors w), F = M, or 2M when hyperbolic.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attention.base import Description, HeadShape
from attention.feature_maps.base import FeatureMap, Features, Sign
from attention.feature_maps.exponential_statistics import (
    AStructure,
    Fit,
    TStructure,
    fit,
    moments,
    transform,
    transform_transposed,
)
from attention.projections.base import Projection
from attention.projections.draws import Draws, check_rows
from attention.projections.moments import moment_generating

_PAPERS = {("zero", "identity"): "2009.14794", ("scalar", "identity"): "2205.15317"}


@dataclass(frozen=True)
class Prepared:
    """One fit per example and head, multiplied into the projection: a token then costs F D, as in FAVOR+."""

    fit: Fit | None  # None: A = 0, T = I, no shift
    weight_q: Tensor  # W B of the queries [M, D] or [.., H, M, D]
    weight_k: Tensor
    offset: Tensor | float  # w'Aw + log constant, [.., H, 1, M] or 0
    key_padding_mask: Tensor | None


class Exponential(FeatureMap):
    """f(w, x) = exp(w'Aw + w'(I - 4A)^{1/2} T x - |T x|^2 / 2) det(I - 4A)^{1/4}, with T^{-1} in place of T for keys.

    E[f(w, x) f(w, y)] = exp(x.y) over w ~ N(0, I), for every A < I/8 and every T that do not depend on w; here
    x = D^{-1/4} q and y = D^{-1/4} k. A and T minimise the mean logarithm of the second moment over all pairs of real
    tokens of the example and head (2302.00787). They carry no gradient.

    a_structure  t_structure   estimator
    zero         identity      PosRF, FAVOR+ (2009.14794): fixed, nothing is fitted
    scalar       identity      OPRF, FAVOR++ (2205.15317)
    scalar       diagonal      SADERF        (2302.00787)
    scalar       full          ADERF         (2302.00787)
    diag         orthogonal    SDERF, FAVOR# (2302.00787)
    diag         diagonal      both diagonal
    diag         full          both without restriction

    With orthogonal or full T, A is diagonal in the eigenbasis of E[z z'], z = T x + T^{-1} y, which is optimal given T.
    `key_shift` moves all keys by the constant that makes the mean of z zero. The estimate stays unbiased for exp(x.y),
    gains precision, and becomes invariant to k -> k + constant, as softmax is.
    `hyperbolic` uses w and -w (2009.14794): F = 2 M features.
    `epsilon` is Performer's constant inside the feature, exp(..) + epsilon after its stabiliser: it mixes in a uniform
    component and biases the estimate. 0 leaves it out.
    """

    sign: ClassVar[Sign] = "positive"
    description = Description(paper="2302.00787", exact=False, complexity="L F D")

    def __init__(
        self,
        shape: HeadShape,
        generator: torch.Generator,
        *,
        projection: Projection,
        num_features: int,
        a_structure: AStructure,
        t_structure: TStructure,
        key_shift: bool = False,
        hyperbolic: bool = False,
        per_head: bool = False,
        ridge: float | None = None,
        epsilon: float = 0.0,
        allow_biased: bool = False,
    ) -> None:
        """`ridge`: for diagonal and full T, relative, of second moments over fewer than 2 D tokens; adds no bias."""
        super().__init__()
        _check_structure(a_structure, t_structure)
        check_rows(projection, allow_biased, needs_chi_norms=a_structure != "zero")
        _check_numbers(t_structure, ridge, epsilon)
        self.a_structure, self.t_structure, self.key_shift = a_structure, t_structure, key_shift
        self.hyperbolic, self.ridge, self.epsilon, self.law = hyperbolic, ridge or 0.0, epsilon, projection
        self.scale = shape.head_dim**-0.25
        self.projection = Draws(projection, num_features, shape, generator, per_head)
        self.fitted = key_shift or (a_structure, t_structure) != ("zero", "identity")
        if self.projection.signed:
            self.sign = "signed"
        paper = _PAPERS.get((a_structure, t_structure), "2302.00787")
        matrices = " + F D^2 + D^3" if self.fitted else ""
        self.description = Description(paper=paper, exact=False, complexity=f"L F D{matrices}")
        self.exemptions = {"U8": "A, T and the key shift follow the inputs without gradient"} if self.fitted else {}

    @property
    def num_outputs(self) -> int:
        return self.projection.num_rows * (2 if self.hyperbolic else 1)

    def scaled(self, x: Tensor) -> Tensor:
        return x * self.scale

    def prepare(self, q: Tensor, k: Tensor, key_padding_mask: Tensor | None) -> Prepared:
        """Fit A, T and the shift to the real tokens. Queries are masked with the keys' mask when lengths agree."""
        mask_k = None if key_padding_mask is None else key_padding_mask[:, None]  # [B, 1, L]
        mask_q = mask_k if q.shape[2] == k.shape[2] else None
        return self.prepare_scaled(self.scaled(q), self.scaled(k), mask_q, mask_k, key_padding_mask)

    def prepare_scaled(
        self,
        x: Tensor,
        y: Tensor,
        mask_x: Tensor | None = None,
        mask_y: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Prepared:
        """As `prepare`, on x, y [.., L, D] that are scaled already: what `second_moment` takes as `prepared`."""
        if not self.fitted:
            w = self.projection()
            return Prepared(None, w, w, 0.0, key_padding_mask)
        with torch.no_grad():
            found = self._fit(x, y, mask_x, mask_y)
        return self.prepare_fit(found, key_padding_mask)

    def prepare_fit(self, found: Fit, key_padding_mask: Tensor | None = None) -> Prepared:
        """As `prepare`, with any admissible parameters (all a < 1/8) in place of the fitted ones."""
        w = self.projection()
        a, basis = found.a.unsqueeze(-2), found.basis  # [.., 1, D]
        rotated = transform_transposed(w, basis)
        offset = (rotated.square() * a).sum(dim=-1).unsqueeze(-2) + found.log_constant[..., None, None]
        scaled = rotated * (1 - 4 * a).sqrt()  # (I - 4A)^{1/2} w = Q'(1 - 4a)^{1/2} Q w, as rows
        if basis is not None:
            scaled = scaled @ basis
        weight_q, weight_k = transform(scaled, found.t), transform(scaled, found.t_inverse)
        return Prepared(found, weight_q, weight_k, offset, key_padding_mask)

    def _fit(self, x: Tensor, y: Tensor, mask_x: Tensor | None, mask_y: Tensor | None) -> Fit:
        ridges = (self._relative_ridge(x, mask_x), self._relative_ridge(y, mask_y))
        found = fit(moments(x, y, mask_x, mask_y), self.a_structure, self.t_structure, self.key_shift, ridges)
        parts = (found.a, found.basis, found.t, found.t_inverse, found.shift)
        return Fit(*(None if part is None else part.to(x.dtype) for part in parts))

    def _relative_ridge(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """`ridge` where a second moment has too few tokens to be regular, else the root of the rounding error."""
        dim = x.shape[-1]
        count = torch.tensor(x.shape[-2], device=x.device) if mask is None else (~mask).sum(dim=-1)
        rounding = torch.finfo(x.dtype).eps ** 0.5
        return torch.where(count < 2 * dim, self.ridge, min(self.ridge, rounding))[..., None, None].double()

    def forward(self, x: Tensor, is_query: bool, prepared: Prepared | None = None) -> Features:
        if prepared is None:
            raise ValueError("Exponential: hand forward() what prepare(q, k, mask) returned for this batch")
        x = self.scaled(x)
        found = prepared.fit
        if found is None:
            row = -0.5 * x.square().sum(dim=-1, keepdim=True)
        elif is_query:
            row = -0.5 * transform(x, found.t).square().sum(dim=-1, keepdim=True)
            if found.shift is not None:  # exp(x.y) = exp(x.c) exp(x.(y - c))
                row = row + (x * found.shift).sum(dim=-1, keepdim=True)
        else:
            x = x if found.shift is None else x - found.shift
            row = -0.5 * transform(x, found.t_inverse).square().sum(dim=-1, keepdim=True)
        amplitude = self.projection.amplitudes(is_query) * (math.sqrt(0.5) if self.hyperbolic else 1.0)
        if isinstance(amplitude, float):
            row = row + math.log(amplitude)
        products = x @ (prepared.weight_q if is_query else prepared.weight_k).transpose(-2, -1)  # [B, H, L, M]
        common = row + prepared.offset  # [B, H, L, 1], or [B, H, L, M] with A != 0
        logits = torch.cat([common + products, common - products], dim=-1) if self.hyperbolic else common + products
        values = None
        if isinstance(amplitude, Tensor):
            values = torch.cat([amplitude, amplitude], dim=-1) if self.hyperbolic else amplitude
            values = values.expand_as(logits)
        if self.epsilon:
            features = self._performer_exp(logits, is_query, prepared.key_padding_mask)
            return Features(features if values is None else values * features)
        return Features(values, logits)

    def _performer_exp(self, logits: Tensor, is_query: bool, key_padding_mask: Tensor | None) -> Tensor:
        """exp(logits - max) + epsilon as Performer stabilises it: by the query's maximum, or that of all real keys."""
        if is_query:
            top = logits.amax(dim=-1, keepdim=True)
        else:
            if key_padding_mask is not None:
                logits = logits.masked_fill(key_padding_mask[:, None, :, None], -torch.inf)
            top = logits.amax(dim=(-2, -1), keepdim=True)
        return (logits - top.detach()).exp() + self.epsilon

    def kernel(self, x: Tensor, y: Tensor, prepared: Prepared | None = None) -> Tensor:
        """exp(x.y) with Gaussian rows, whatever was fitted; with other rows (`allow_biased`) their true mean."""
        self._check_closed_form()
        k = (x * y).sum(dim=-1).exp()
        if self.law.gaussian_marginals:
            return k
        z = self._fit_or(prepared, x, y).z(x, y)
        return k * moment_generating(self.law, z) * (-z.square().sum(dim=-1) / 2).exp()

    def second_moment(self, x: Tensor, y: Tensor, prepared: Prepared | None = None) -> Tensor:
        """E[(f(w, x) f(w, y))^2] of one w (of one pair w, -w when hyperbolic), x, y [.., L, D] already scaled.

        `prepared` comes from `prepare_scaled`; without it, A and T are fitted to these x and y.
        """
        self._check_closed_form()
        found = self._fit_or(prepared, x, y)
        z = found.z(x, y)
        if self.law.gaussian_marginals:
            direct, cross = found.log_second_moment(z).exp(), found.log_cross_moment(z).exp()
        else:
            cross = (-z.square().sum(dim=-1)).exp()
            direct = moment_generating(self.law, 2 * z) * cross
        return (2 * (x * y).sum(dim=-1)).exp() * ((direct + cross) / 2 if self.hyperbolic else direct)

    def _fit_or(self, prepared: Prepared | None, x: Tensor, y: Tensor) -> Fit:
        if not self.fitted:
            return Fit(torch.zeros_like(x[..., 0, :] if x.dim() > 1 else x), None, None, None, None)
        found = prepared.fit if prepared is not None else self._fit(x, y, None, None)
        assert found is not None
        return found

    def _check_closed_form(self) -> None:
        if self.epsilon:
            raise NotImplementedError("epsilon depends on the stabiliser: its estimate has no closed-form mean")
        if self.a_structure != "zero" and not self.law.gaussian_marginals:
            raise NotImplementedError(f"with A != 0 the mean over rows of {type(self.law).__name__} has no closed form")


def _check_structure(a_structure: str, t_structure: str) -> None:
    if a_structure not in ("zero", "scalar", "diag"):
        raise ValueError(f"Exponential: a_structure must be zero, scalar or diag, got {a_structure!r}")
    if t_structure not in ("identity", "orthogonal", "diagonal", "full"):
        raise ValueError(
            f"Exponential: t_structure must be identity, orthogonal, diagonal or full, got {t_structure!r}"
        )
    if t_structure == "orthogonal" and a_structure != "diag":
        raise ValueError(
            f"Exponential: an orthogonal T only turns w, which changes nothing when A is {a_structure}. "
            "Use t_structure=identity, or a_structure=diag."
        )


def _check_numbers(t_structure: str, ridge: float | None, epsilon: float) -> None:
    inverts = t_structure in ("diagonal", "full")
    if inverts != (ridge is not None):
        need = "needs a `ridge`, which keeps singular matrices invertible" if inverts else "has no use for a `ridge`"
        raise ValueError(f"Exponential: t_structure={t_structure} {need}")
    if epsilon < 0 or (ridge is not None and ridge < 0):
        raise ValueError(f"Exponential: epsilon and ridge must not be negative, got {epsilon} and {ridge}")
