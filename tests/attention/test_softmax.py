"""Softmax attention: the fused form against the definition."""

import pytest
import torch

from attention.base import HeadShape
from attention.softmax import Softmax, softmax_attention
from tests.attention.conftest import build, draw_qkv, padding

SHAPE = HeadShape(num_heads=2, head_dim=16, max_len=64)


def test_fused_and_definition_agree_in_outputs_and_gradients() -> None:
    for length in (1, 7, 37):
        mask = padding(length)
        mask[1] = length == 7  # one example without any real key
        inputs = [x.requires_grad_() for x in draw_qkv(length)]
        weight = draw_qkv(length, seed=5)[0]
        results = []
        for attend in (build("softmax"), softmax_attention):
            out = attend(*inputs, mask)
            results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
        for fused, plain in zip(*results, strict=True):
            torch.testing.assert_close(fused, plain, rtol=1e-9, atol=1e-12)


def test_the_definition_is_the_formula() -> None:
    q, k, v = (x[0, 0] for x in draw_qkv(5))
    expected = torch.stack(
        [
            sum((q[i] @ k[j] / 4).exp() * v[j] for j in range(5)) / sum((q[i] @ k[j] / 4).exp() for j in range(5))
            for i in range(5)
        ]
    )
    torch.testing.assert_close(softmax_attention(q[None, None], k[None, None], v[None, None], None)[0, 0], expected)


def test_a_constant_added_to_every_key_changes_nothing() -> None:
    q, k, v = draw_qkv(37)
    attend = build("softmax")
    torch.testing.assert_close(attend(q, k + 3.0, v), attend(q, k, v), rtol=1e-9, atol=1e-12)


def test_half_precision_is_not_upcast() -> None:
    q, k, v = draw_qkv(37, dtype=torch.bfloat16)
    seen = []
    attend = build("softmax", dtype=torch.bfloat16)
    attend.mix = lambda *inputs: seen.append(inputs[0].dtype) or inputs[2]
    attend(q, k, v)
    assert seen == [torch.bfloat16]


def test_dropout_acts_in_training_only_and_must_be_a_probability() -> None:
    attend = Softmax(SHAPE, torch.Generator(), dropout=0.5)
    q, k, v = draw_qkv(37)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert not torch.allclose(attend.train()(q, k, v), attend.eval()(q, k, v))
    torch.testing.assert_close(attend.eval()(q, k, v), softmax_attention(q, k, v, None))
    with pytest.raises(ValueError, match=r"dropout=1\.5"):
        Softmax(SHAPE, torch.Generator(), dropout=1.5)
