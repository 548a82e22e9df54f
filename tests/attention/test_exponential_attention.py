"""Attention over exponential features: Performer, FAVOR++, FAVOR# and relatives against their definitions."""

import math

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape, count_keys
from attention.feature_maps.exponential import Exponential
from attention.feature_maps.exponential_statistics import Fit, fit, moments
from attention.linear import LinearAttention, linear_attention
from attention.normalizers import Normalizer
from attention.projections.gaussian import Orthogonal
from tests.attention.conftest import build, deviation, draw, draw_qkv, padding
from tests.attention.test_exponential import dense, features, make, rng


def slow_attention(m: Exponential, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Features without a stabiliser, all pairs, in the order of the definition."""
    prepared = m.prepare(q, k, mask)
    weights = features(m, q * m.scale, True, prepared) @ features(m, k * m.scale, False, prepared).transpose(-2, -1)
    weights = weights.masked_fill(mask[:, None, None], 0.0)
    return weights @ v / weights.sum(dim=-1, keepdim=True)


NAMES = ["performer", "favor_plus_plus", "favor_sharp", "saderf", "aderf", "diag_derf", "full_derf", "hyperbolic"]


@pytest.mark.parametrize("name", NAMES)
def test_the_stabilised_linear_form_is_the_definition_with_its_gradients(name: str) -> None:
    module = build(name, head_dim=5)
    mask = padding(23)
    q, k, v = (x.requires_grad_() for x in draw_qkv(23, head_dim=5))
    fast, slow = module(q, k, v, mask), slow_attention(module.feature_map, q, k, v, mask)
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-12)
    probe = draw(*v.shape, seed=5)
    for a, b in zip(*(torch.autograd.grad((o * probe).sum(), (q, k, v)) for o in (fast, slow)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_single_global_maximum_stabilises_to_the_same_weights(name: str) -> None:
    """S1 of the specification: the row's maximum for queries, one for all real keys of an example and head."""
    module, mask = build(name), padding(23)
    q, k, v = draw_qkv(23)
    m = module.feature_map
    prepared = m.prepare(q, k, mask)
    logits_q, logits_k = m(q, True, prepared).logits, m(k, False, prepared).logits
    logits_k = logits_k.masked_fill(mask[:, None, :, None], -torch.inf)
    phi_q = (logits_q - logits_q.amax(dim=-1, keepdim=True)).exp()
    phi_k = (logits_k - logits_k.amax(dim=(2, 3), keepdim=True)).exp()
    expected = linear_attention(phi_q, phi_k, v, Normalizer("sum"), count_keys(k, mask))
    torch.testing.assert_close(module(q, k, v, mask), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["favor_plus_plus", "favor_sharp", "aderf", "full_derf"])
def test_statistics_are_those_of_the_real_tokens(name: str) -> None:
    module, mask = build(name, head_dim=4), padding(23)
    q, k, _ = draw_qkv(23, head_dim=4)
    m = module.feature_map
    found = m.prepare(q, k, mask).fit
    for b in range(2):
        x, y = (part[b : b + 1, :1, ~mask[b]] * m.scale for part in (q, k))
        alone = fit(moments(x, y), m.a_structure, m.t_structure, m.key_shift, (2.0**-26, 2.0**-26))
        for actual, expected in zip(dense_of(found, b), dense(alone), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def dense_of(found: Fit, b: int) -> tuple[Tensor, Tensor]:
    parts = (found.a, found.basis, found.t, found.t_inverse, found.shift)
    return dense(Fit(*(None if p is None else p[b : b + 1] for p in parts)))


@pytest.mark.parametrize("name", ["oprf", "sderf", "full", "posrf"])
def test_a_constant_added_to_all_keys_changes_nothing_with_the_key_shift(name: str) -> None:
    q, k, v = draw_qkv(23, num_heads=1, head_dim=6)
    constant = draw(1, 1, 1, 6, seed=8, scale=3.0)
    outputs = {}
    for shift in (True, False):
        m = make(name, dim=6, num_features=16, key_shift=shift)
        module = LinearAttention(
            HeadShape(1, 6, 64), rng(0), feature_map=lambda *_, m=m: m, normalizer=Normalizer("sum")
        )
        module = module.double()
        outputs[shift] = deviation(module(q, k + constant, v), module(q, k, v))
    assert outputs[True] < 1e-10
    assert outputs[False] > 1e-3


@pytest.mark.parametrize("name", ["performer", "favor_plus_plus", "favor_sharp", "full_derf", "hyperbolic"])
def test_more_features_come_closer_to_softmax(name: str) -> None:
    q, k, v = draw_qkv(40, num_heads=1, head_dim=8, scale=0.5)
    exact = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(8), dim=-1) @ v
    m = build(name, num_heads=1, head_dim=8).feature_map
    errors = []
    for size in (64, 4096):
        wide = Exponential(
            HeadShape(1, 8, 64), rng(3), projection=Orthogonal(), num_features=size, a_structure=m.a_structure,
            t_structure=m.t_structure, key_shift=m.key_shift, hyperbolic=m.hyperbolic, ridge=m.ridge or None,
        )  # fmt: skip
        attention = LinearAttention(
            HeadShape(1, 8, 64), rng(3), feature_map=lambda *_, w=wide: w, normalizer=Normalizer("sum")
        ).double()
        errors.append(float((attention(q, k, v) - exact).square().mean().sqrt()))
    assert errors[1] < 0.35 * errors[0]  # 1/8 expected
    assert errors[1] < 0.1 * float(exact.std())


@pytest.mark.parametrize("name", NAMES)
def test_large_norms_stay_finite_and_accurate_in_float32(name: str) -> None:
    """|x|^2 = 50 and more, with an outlier key."""
    scale = math.sqrt(50 / 16) * 16**0.25
    q, k, v = draw_qkv(40, head_dim=16, scale=scale)
    k[:, :, 5] *= 3
    low = [x.float().requires_grad_() for x in (q, k, v)]
    out = build(name, head_dim=16, dtype=torch.float32)(*low, padding(40))
    gradients = torch.autograd.grad(out.square().sum(), low)
    assert all(bool(x.isfinite().all()) for x in (out, *gradients))
    real = ~padding(40)[:, None].expand(-1, 2, -1)
    assert deviation(out.double()[real], build(name, head_dim=16)(q, k, v, padding(40))[real]) < 1e-2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_real_key_passes_its_value_with_finite_gradients(name: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype).requires_grad_() for x in draw_qkv(7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 3] = mask[1, 0] = False
    out = build(name, dtype=dtype)(q, k, v, mask)
    expected = torch.stack([v[0, :, 3], v[1, :, 0]])[:, :, None].expand_as(out)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_epsilon_is_performers_constant_inside_the_feature() -> None:
    q, k, v = draw_qkv(23)
    mask = padding(23)
    m = Exponential(
        HeadShape(2, 16, 64), rng(0), projection=Orthogonal(), num_features=32, a_structure="zero",
        t_structure="identity", epsilon=1e-2,
    ).double()  # fmt: skip
    module = LinearAttention(HeadShape(2, 16, 64), rng(0), feature_map=lambda *_: m, normalizer=Normalizer("sum"))
    x, y, w = q * 16**-0.25, k * 16**-0.25, m.projection()
    a = x @ w.T - x.square().sum(dim=-1, keepdim=True) / 2
    b = (y @ w.T - y.square().sum(dim=-1, keepdim=True) / 2).masked_fill(mask[:, None, :, None], -torch.inf)
    weights = ((a - a.amax(-1, keepdim=True)).exp() + 1e-2) @ (
        (b - b.amax((-2, -1), keepdim=True)).exp() + 1e-2
    ).transpose(-2, -1)
    weights = weights.masked_fill(mask[:, None, None], 0.0)
    torch.testing.assert_close(module(q, k, v, mask), weights @ v / weights.sum(dim=-1, keepdim=True))
    with pytest.raises(NotImplementedError, match="no closed-form mean"):
        m.kernel(x, y)
