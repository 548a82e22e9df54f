"""The Synthesizers against loops, and what their logits may depend on."""

import functools

import pytest
import torch
from torch import Tensor, nn

from attention.base import HeadShape
from attention.softmax import softmax_attention
from attention.synthesizer import Dense, Factorized, Random, Synthesizer
from tests.attention.conftest import dense_attention, deviation, draw, draw_qkv, padding

SHAPE = HeadShape(num_heads=2, head_dim=8, max_len=40)
PARTS = {"dense": Dense, "random": Random, "factorized": functools.partial(Factorized, rank=3)}
every_part = pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)


def _synthesizer(*parts, dot_product: bool = False) -> Synthesizer:
    generator = torch.Generator().manual_seed(0)
    return Synthesizer(SHAPE, generator, parts=parts, dot_product=dot_product).double().eval()


def _logits(part: nn.Module, q: Tensor) -> Tensor:
    """S_ij for each pair, from the definition."""
    batch, heads, length, _ = q.shape
    logits = torch.zeros(batch, heads, length, length, dtype=q.dtype)
    for h in range(heads):
        for i in range(length):
            for j in range(length):
                if isinstance(part, Dense):
                    hidden = (q[:, h, i] @ part.weight1[h] + part.bias1[h, 0]).clamp_min(0)  # [B, D]
                    logits[:, h, i, j] = hidden @ part.weight2[h, :, j] + part.bias2[h, 0, j]
                elif isinstance(part, Random):
                    logits[:, h, i, j] = part.logits[h, i, j]
                else:
                    logits[:, h, i, j] = part.rows[h, i] @ part.columns[h, j]
    return logits


@every_part
@pytest.mark.parametrize("length", [1, 11])
def test_outputs_and_gradients_equal_the_definition(part, length: int) -> None:
    module = _synthesizer(part)
    for mask in (torch.zeros(2, length, dtype=torch.bool), padding(length)):
        q, k, v = draw_qkv(length, head_dim=8)
        q.requires_grad_()
        expected = dense_attention(_logits(module.parts[0], q), v, ~mask[:, None, None])
        out = module(q, k, v, mask)
        assert deviation(out, expected) < 1e-12
        cotangent = draw(*out.shape, seed=7)
        parameters = list(module.parameters())
        found, truth = (torch.autograd.grad((o * cotangent).sum(), parameters) for o in (out, expected))
        assert all(deviation(a, b) < 1e-10 or b.abs().max() < 1e-12 for a, b in zip(found, truth, strict=True))


@every_part
def test_keys_and_for_fixed_logits_queries_are_not_looked_at(part) -> None:
    module = _synthesizer(part)
    q, k, v = draw_qkv(37, head_dim=8)
    assert torch.equal(module(q, k, v), module(q, -k, v))
    assert torch.equal(module(q, k, v), module(-q, k, v)) is (part is not Dense)


def test_a_mixture_without_synthetic_logits_is_softmax_attention() -> None:
    module = _synthesizer(Random, dot_product=True)
    nn.init.zeros_(module.parts[0].logits)
    q, k, v = draw_qkv(37, head_dim=8)
    mask = padding(37)
    assert deviation(module(q, k, v, mask), softmax_attention(q, k, v, mask)) < 1e-12


def test_the_logits_of_a_mixture_add() -> None:
    module = _synthesizer(Dense, PARTS["factorized"], dot_product=True)
    q, k, v = draw_qkv(9, head_dim=8)
    logits = sum(_logits(part, q) for part in module.parts) + q @ k.transpose(-2, -1) / 8**0.5
    assert deviation(module(q, k, v), dense_attention(logits, v, torch.ones(9, 9, dtype=torch.bool))) < 1e-12


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one of the parts"):
        _synthesizer()
    with pytest.raises(ValueError, match="raise max_len"):
        _synthesizer(Dense)(*draw_qkv(41, head_dim=8))
