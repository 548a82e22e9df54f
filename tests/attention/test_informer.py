"""Informer: its selection, its limits, and its behaviour under padding."""

import math

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape, mean_over_keys
from attention.low_rank.informer import Informer
from attention.low_rank.real_keys import RealPositions
from attention.softmax import softmax_attention
from tests.attention.conftest import deviation, draw, draw_qkv, padding

LENGTH = 37


def informer(*, num_samples=10, num_queries=6, factor=None) -> Informer:
    return Informer(
        HeadShape(2, 16, 64),
        torch.Generator().manual_seed(0),
        num_samples=num_samples,
        num_queries=num_queries,
        factor=factor,
    ).double()


def definition(module: Informer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query at a time, over real positions only."""
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        real = (~mask[b]).nonzero().flatten()
        count = len(real)
        budget = None if module.factor is None else module.factor * math.ceil(math.log(count))
        num_samples = module.num_samples if budget is None else budget
        num_queries = module.num_queries if budget is None else budget
        for h in range(q.shape[1]):
            keys, values = k[b, h, real], v[b, h, real]
            measure = {}
            for i in real.tolist():
                sample = [int(draw) * count // 2**31 for draw in module.draws[i, :num_samples]]
                scores = (keys[sample] @ q[b, h, i] / 4).detach()
                measure[i] = float(scores.max() - scores.mean())
            chosen = sorted(measure, key=measure.get, reverse=True)[:num_queries]
            for i in real.tolist():
                out[b, h, i] = (keys @ q[b, h, i] / 4).softmax(0) @ values if i in chosen else values.mean(dim=0)
    return out


@pytest.mark.parametrize(
    "module", [informer(), informer(num_samples=None, num_queries=None, factor=2)], ids=["fixed", "factor"]
)
def test_outputs_and_gradients_are_those_of_the_definition(module: Informer) -> None:
    inputs = [x.requires_grad_() for x in draw_qkv(LENGTH, scale=1.5)]
    mask = padding(LENGTH)
    real = ~mask[:, None, :, None]
    fast, slow = module(*inputs, mask) * real, definition(module, *inputs, mask) * real
    assert deviation(fast, slow) < 1e-12
    probe = draw(*fast.shape, seed=7)
    for actual, expected in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        assert deviation(actual, expected) < 1e-10


def test_selecting_every_query_is_exact_softmax() -> None:
    inputs, mask = draw_qkv(LENGTH, scale=2.0), padding(LENGTH)
    out = informer(num_queries=LENGTH)(*inputs, mask)
    assert deviation(out, softmax_attention(*inputs, mask)) < 1e-12


def test_selecting_no_query_is_the_mean_of_real_values() -> None:
    q, k, v = draw_qkv(LENGTH)
    mask = padding(LENGTH)
    out = informer(num_queries=0)(q, k, v, mask)
    assert deviation(out, mean_over_keys(v, mask).expand_as(v)) < 1e-12


def test_sampling_every_key_gives_the_exact_measure() -> None:
    module = informer(num_samples=LENGTH)
    module.draws.copy_(((torch.arange(LENGTH) * 2**31) // LENGTH + 1).expand(64, -1))  # each rank once
    q, k, _ = draw_qkv(LENGTH)
    scores = q @ k.transpose(-2, -1)
    expected = scores.amax(dim=-1) - scores.mean(dim=-1)
    assert deviation(module.sparsity(q, k, RealPositions.of(q, None)), expected) < 1e-12


def test_padded_queries_are_never_selected() -> None:
    q, k, v = draw_qkv(LENGTH)
    mask = padding(LENGTH)
    loud = torch.where(mask[:, None, :, None], 1000 * q, q)  # would have the largest measure by far
    real = ~mask[:, None].expand(-1, 2, -1)
    module = informer()
    assert torch.equal(module(loud, k, v, mask)[real], module(q, k, v, mask)[real])


def test_budgets_that_grow_with_the_length_count_real_positions() -> None:
    module = informer(num_samples=None, num_queries=None, factor=5)
    assert module.draws.shape == (64, 5 * math.ceil(math.log(64)))
    inputs = draw_qkv(LENGTH, scale=1.5)
    longer = [torch.cat([x, x[:, :, :20]], dim=2) for x in inputs]  # 5 ceil(ln 57) differs from 5 ceil(ln 20)
    for count in (20, LENGTH):
        short_mask, long_mask = (torch.arange(n).expand(2, -1) >= count for n in (LENGTH, LENGTH + 20))
        short, long = module(*inputs, short_mask), module(*longer, long_mask)
        assert deviation(long[:, :, :count], short[:, :, :count]) < 1e-12


def test_the_two_ways_to_size_the_sample_exclude_each_other() -> None:
    for wrong in ({"factor": 5}, {"num_samples": None}, {"num_samples": None, "num_queries": None}):
        with pytest.raises(ValueError, match="factor"):
            informer(**wrong)
    with pytest.raises(ValueError, match="max_len"):
        informer()(*draw_qkv(65))
