"""Trigonometric features: TrigRF and random feature attention, against their definitions and closed forms."""

import math

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape
from attention.feature_maps.trigonometric import RandomFeatureAttention, TrigRF
from attention.linear import LinearAttention
from attention.normalizers import Normalizer
from attention.projections.base import Projection
from attention.projections.gaussian import Gaussian, Orthogonal
from attention.projections.quadrature import SparseGrid
from tests.attention.conftest import build, draw, draw_qkv, padding

GOLDEN_X, GOLDEN_Y = (torch.tensor(v, dtype=torch.float64) for v in ((0.5, -0.2, 0.1, 0.4), (0.3, 0.1, -0.6, 0.2)))


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trig(dim: int, num_features: int, law: Projection | None = None, allow_biased: bool = False) -> TrigRF:
    shape = HeadShape(2, dim, 64)
    law = law or Gaussian()
    return TrigRF(shape, rng(0), projection=law, num_features=num_features, allow_biased=allow_biased).double()


def rfa(dim: int, num_features: int, temperature: float = 1.0, norm_epsilon: float = 0.0) -> RandomFeatureAttention:
    return RandomFeatureAttention(
        HeadShape(2, dim, 64), rng(0), projection=Gaussian(), num_features=num_features, temperature=temperature,
        norm_epsilon=norm_epsilon,
    ).double()  # fmt: skip


def pair_estimates(m: TrigRF, x: Tensor, y: Tensor) -> Tensor:
    """One estimate of exp(x.y) per row w, [.., M], from inputs that are scaled already."""
    products = 1.0
    for side, part in ((True, x), (False, y)):
        found = m(part / m.scale, side)
        products = products * found.values * found.logits.exp()
    return products.unflatten(-1, (2, -1)).sum(dim=-2) * m.projection.num_rows


def test_golden_variance_and_its_closed_form() -> None:
    m, (x, y) = trig(4, 1), (GOLDEN_X, GOLDEN_Y)
    variance = m.second_moment(x, y) - m.kernel(x, y) ** 2
    assert float(variance) == pytest.approx(0.30482759, rel=1e-7)
    norms, distance = x.square().sum() + y.square().sum(), (x - y).square().sum()
    assert float(variance) == pytest.approx(float(norms.exp() * (1 - (-distance).exp()) ** 2 / 2), rel=1e-12)
    assert float(m.kernel(x, y)) == pytest.approx(1.1618342427, rel=1e-10)


def test_sampled_estimates_have_the_closed_form_mean_and_variance() -> None:
    """The harness of rule U13: 6 standard errors (2e-9), variance within a tenth."""
    m, (x, y) = trig(4, 400_000), (GOLDEN_X[None, None, None], GOLDEN_Y[None, None, None])
    estimates = pair_estimates(m, x, y)
    k, second = m.kernel(x, y), m.second_moment(x, y)
    assert bool(((estimates.mean(dim=-1) - k).abs() < 6 * ((second - k**2) / 400_000).sqrt()).all())
    torch.testing.assert_close(estimates.var(dim=-1), second - k**2, rtol=0.1, atol=0)


@pytest.mark.parametrize("law", [Gaussian(), Orthogonal()])
def test_the_estimate_is_exact_where_query_and_key_agree(law: Projection) -> None:
    x = draw(1, 1, 6, 5, seed=1)
    estimates = pair_estimates(trig(5, 3, law), x, x).mean(dim=-1)
    torch.testing.assert_close(estimates, x.square().sum(dim=-1).exp())


def test_rows_of_one_norm_have_the_mean_that_kernel_states() -> None:
    """50 000 independent blocks; 6 standard errors, far from the Gaussian value."""
    m = trig(4, 4 * 50_000, Orthogonal(norms="fixed"), allow_biased=True)
    x, y = 1.5 * GOLDEN_X[None, None, None], 1.5 * GOLDEN_Y[None, None, None]
    blocks = pair_estimates(m, x, y).unflatten(-1, (-1, 4)).mean(dim=-1)
    standard_error = float(blocks.std()) / math.sqrt(50_000)
    assert abs(float(blocks.mean() - m.kernel(x, y))) < 6 * standard_error
    assert abs(float(m.kernel(x, y) - (x * y).sum(dim=-1).exp())) > 12 * standard_error


def test_a_quadrature_with_a_negative_weight_sums_to_its_rule() -> None:
    m = trig(5, 11, SparseGrid(), allow_biased=True)
    x, y = draw(1, 1, 6, 5, seed=1), draw(1, 1, 6, 5, seed=2)
    torch.testing.assert_close(pair_estimates(m, x, y).mean(dim=-1), m.kernel(x, y), rtol=1e-6, atol=0)


def slow_weights(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """sum_m cos(w_m.(x_i - y_j)) / M over all pairs [B, H, L, L]."""
    return ((x @ w.T)[:, :, :, None] - (y @ w.T)[:, :, None]).cos().mean(dim=-1)


def test_the_attention_is_its_definition_with_gradients() -> None:
    module, mask = build("trigrf", head_dim=5), padding(13)
    q, k, v = (x.requires_grad_() for x in draw_qkv(13, head_dim=5))
    x, y = q * 5**-0.25, k * 5**-0.25
    norms = y.square().sum(dim=-1) / 2
    # in the units of the stabiliser, in which the clamp is defined
    top = norms.masked_fill(mask[:, None], -torch.inf).amax(dim=-1, keepdim=True).detach()
    weights = slow_weights(x, y, module.feature_map.projection()) * (norms - top).exp()[:, :, None]
    weights = weights.masked_fill(mask[:, None, None], 0.0)
    num_keys = (~mask).sum(dim=1).double()[:, None, None, None]
    slow = module.normalizer.divide(weights @ v, weights.sum(dim=-1, keepdim=True), num_keys)
    fast = module(q, k, v, mask)
    torch.testing.assert_close(fast, slow)
    probe = draw(*v.shape, seed=5)
    for a, b in zip(*(torch.autograd.grad((o * probe).sum(), (q, k, v)) for o in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)


def test_rfa_is_trigrf_on_unit_vectors_up_to_a_constant() -> None:
    q, k, _ = draw_qkv(9, head_dim=8)
    unit_q, unit_k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    plain, softmax = rfa(8, 16), trig(8, 16)
    weights = plain(q, True).values @ plain(k, False).values.transpose(-2, -1)
    parts = [softmax(x / softmax.scale, side) for x, side in ((unit_q, True), (unit_k, False))]
    unit = (parts[0].values * parts[0].logits.exp()) @ (parts[1].values * parts[1].logits.exp()).transpose(-2, -1)
    torch.testing.assert_close(unit, math.e * weights, atol=1e-12, rtol=1e-9)


def test_rfa_estimates_softmax_of_cosines_at_its_temperature() -> None:
    """E = exp((cos - 1) / tau^2) at sigma = 1; 400 000 rows, 6 standard errors of cosines bounded by 1."""
    m = rfa(8, 400_000, temperature=0.8)
    q, k, _ = draw_qkv(3, batch=1, head_dim=8)
    estimate = (m(q, True).values @ m(k, False).values.transpose(-2, -1)).detach()
    cosine = torch.nn.functional.cosine_similarity(q[:, :, :, None], k[:, :, None], dim=-1)
    assert float((estimate - ((cosine - 1) / 0.64).exp()).abs().max()) < 6 / math.sqrt(400_000)
    scaled_q, scaled_k = m.scaled(q)[:, :, :, None], m.scaled(k)[:, :, None]
    torch.testing.assert_close(m.kernel(scaled_q, scaled_k).detach(), ((cosine - 1) / 0.64).exp())
    variance = (m.second_moment(scaled_q, scaled_k) - m.kernel(scaled_q, scaled_k) ** 2).detach()
    torch.testing.assert_close(variance, (1 - m.kernel(scaled_q, scaled_k).detach() ** 2) ** 2 / 2)


def test_rfa_learns_a_scale_for_each_head_and_coordinate() -> None:
    module = build("rfa")
    q, k, v = draw_qkv(13)
    module(q, k, v, padding(13)).square().sum().backward()
    assert module.feature_map.sigma.shape == (2, 1, 16)
    assert bool((module.feature_map.sigma.grad != 0).all())
    before = module(q, k, v)
    with torch.no_grad():
        module.feature_map.sigma[1] *= 2
    after = module(q, k, v)
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert not torch.allclose(after[:, 1], before[:, 1])


def test_rfa_survives_a_zero_vector_and_ignores_the_length_of_others() -> None:
    module = build("rfa")
    q, k, v = draw_qkv(13)
    q[:, :, 2] = 0
    k[:, :, 4] = 0
    q.requires_grad_(), k.requires_grad_()
    out = module(q, k, v)
    assert all(bool(g.isfinite().all()) for g in (out, *torch.autograd.grad(out.sum(), (q, k))))
    m = rfa(8, 16)
    x = draw(1, 2, 5, 8, seed=3)
    torch.testing.assert_close(m(x, True).values, m(7 * x, True).values)


def test_large_norms_stay_finite_in_float32() -> None:
    q, k, v = draw_qkv(40, scale=math.sqrt(50 / 16) * 2)  # |x|^2 = 50
    low = [x.float().requires_grad_() for x in (q, k, v)]
    for name in ("trigrf", "rfa"):
        out = build(name, dtype=torch.float32)(*low, padding(40))
        gradients = torch.autograd.grad(out.square().sum(), low)
        assert all(bool(x.isfinite().all()) for x in (out, *gradients))


def test_a_plain_sum_is_refused_because_it_may_be_negative() -> None:
    with pytest.raises(ValueError, match="signed_clamp"):
        LinearAttention(HeadShape(2, 8, 64), rng(0), feature_map=lambda *_: trig(8, 16), normalizer=Normalizer("sum"))


def test_bad_temperatures_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        rfa(8, 16, temperature=0.0)
