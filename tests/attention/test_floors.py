"""The floors of the comparison."""

import torch

from attention.softmax import softmax_attention
from tests.attention.conftest import build, deviation, draw_qkv, padding


def test_mean_pool_is_softmax_attention_without_queries() -> None:
    q, k, v = draw_qkv(37)
    for mask in (None, padding(37)):
        expected = softmax_attention(torch.zeros_like(q), k, v, mask)
        assert deviation(build("mean_pool")(q, k, v, mask), expected) < 1e-12


def test_identity_returns_the_values() -> None:
    q, k, v = draw_qkv(37)
    assert torch.equal(build("identity")(q, k, v, padding(37)), v)
