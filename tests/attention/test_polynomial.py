"""Polynomial attention: the stable evaluation against powers written out."""

import math

import pytest
import torch

from attention.base import HeadShape
from attention.feature_maps.symmetric_square import symmetric_square
from attention.polynomial import PolynomialAttention
from tests.attention.conftest import draw_qkv, padding

SHAPE = HeadShape(num_heads=2, head_dim=16, max_len=64)


def polynomial(degree: int, *, sink: float = 0.0, scale: float | None = None, layer_norm: str = "none"):
    attend = PolynomialAttention(SHAPE, torch.Generator(), degree=degree, scale=scale, sink=sink, layer_norm=layer_norm)
    return attend.double()


def powers(q, k, v, mask, degree: int, sink: float, scale: float):
    weights = (scale * q @ k.transpose(-2, -1)) ** degree * ~mask[:, None, None, :]
    return weights @ v / (sink + weights.sum(dim=-1, keepdim=True))


@pytest.mark.parametrize("degree", [2, 4, 8])
@pytest.mark.parametrize("sink", [0.0, 1.0])
def test_the_stable_form_equals_plain_powers_in_outputs_and_gradients(degree: int, sink: float) -> None:
    mask = padding(13)
    inputs = [x.requires_grad_() for x in draw_qkv(13, scale=1.0)]
    results = []
    for out in (polynomial(degree, sink=sink)(*inputs, mask), powers(*inputs, mask, degree, sink, 0.25)):
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-10)


def test_the_layer_norm_is_shared_by_queries_and_keys() -> None:
    q, k, v = draw_qkv(13, scale=3.0)
    norm = torch.nn.functional.layer_norm
    attend = polynomial(4, sink=1.0, scale=1.0, layer_norm="shared")
    expected = powers(norm(q, (16,)), norm(k, (16,)), v, torch.zeros(2, 13, dtype=torch.bool), 4, 1.0, 1.0)
    torch.testing.assert_close(attend(q, k, v), expected)
    assert sum(p.numel() for p in attend.parameters()) == 32


def test_without_a_sink_the_scale_and_sign_of_a_query_and_the_scale_of_all_keys_are_ignored() -> None:
    q, k, v = draw_qkv(13)
    factors = torch.linspace(-3, 2.9, 13, dtype=q.dtype)[:, None]
    attend = polynomial(4)
    torch.testing.assert_close(attend(factors * q, 7 * k, v), attend(q, k, v))


def test_degree_two_is_linear_attention_over_squares() -> None:
    q, k, v = draw_qkv(13)
    weights = symmetric_square(q) @ symmetric_square(k).transpose(-2, -1)
    torch.testing.assert_close(polynomial(2)(q, k, v), weights @ v / weights.sum(dim=-1, keepdim=True))


def test_a_large_degree_picks_the_largest_magnitude_without_overflow() -> None:
    q, k, v = draw_qkv(13, dtype=torch.float32, scale=30.0)
    out = polynomial(1000, sink=1.0).float()(q, k, v)
    best = (q @ k.transpose(-2, -1)).abs().argmax(dim=-1)
    expected = v.gather(2, best[..., None].expand_as(v))
    assert (out - expected).norm(dim=-1).median() < 1e-3


def test_a_query_orthogonal_to_every_key_gives_zero_and_finite_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in draw_qkv(5))
    for sink in (0.0, 1.0):
        out = polynomial(4, sink=sink)(q * torch.tensor([0.0, 1, 1, 1, 1])[:, None], k, v)
        assert not out[:, :, 0].any()
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_impossible_settings_are_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"degree=3 must be even.*use 2 or 4"):
        polynomial(3)
    with pytest.raises(ValueError, match="sink=-1"):
        polynomial(2, sink=-1)
    with pytest.raises(ValueError, match="choose shared or none"):
        polynomial(2, layer_norm="both")
    assert math.isclose(polynomial(2).scale, 0.25)
