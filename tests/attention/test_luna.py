"""Luna: packing and unpacking against their definition, and the limits of both."""

import torch

from attention.base import HeadShape
from attention.low_rank.luna import Luna, unpack
from attention.softmax import softmax_attention
from tests.attention.conftest import deviation, draw, draw_qkv, padding

LENGTH = 37


def luna(packed_len: int = 5) -> Luna:
    return Luna(HeadShape(2, 16, 64), torch.Generator().manual_seed(0), packed_len=packed_len, init_std=1.0).double()


def test_outputs_and_gradients_are_those_of_the_definition() -> None:
    module, mask = luna(), padding(LENGTH)
    inputs = [x.requires_grad_() for x in draw_qkv(LENGTH, scale=1.5)]
    q, k, v = inputs
    fast, slow = module(*inputs, mask), torch.zeros_like(v)
    for b in range(2):
        real = ~mask[b]
        for h in range(2):
            keys, values = k[b, h, real], v[b, h, real]
            pack = (module.packed[h] @ keys.T / 4).softmax(dim=-1)
            slow[b, h] = (q[b, h] @ (pack @ keys).T / 4).softmax(dim=-1) @ (pack @ values)
    assert deviation(fast, slow) < 1e-12
    wanted, probe = [*inputs, module.packed], draw(*fast.shape, seed=7)
    for actual, expected in zip(
        torch.autograd.grad((fast * probe).sum(), wanted),
        torch.autograd.grad((slow * probe).sum(), wanted),
        strict=True,
    ):
        assert deviation(actual, expected) < 1e-10


def test_one_packed_vector_serves_every_query_alike() -> None:
    out = luna(packed_len=1)(*draw_qkv(LENGTH), padding(LENGTH))
    assert deviation(out, out[:, :, :1].expand_as(out)) < 1e-12


def test_unpacking_the_unpacked_sequence_is_softmax() -> None:
    q, k, v = draw_qkv(LENGTH, scale=2.0)
    assert deviation(unpack(q, k, v), softmax_attention(q, k, v, None)) < 1e-12


def test_packing_is_a_convex_combination_of_real_rows() -> None:
    _, k, v = draw_qkv(LENGTH)
    mask = padding(LENGTH)
    v = torch.where(mask[:, None, :, None], 1000.0, v)
    keys, values = luna().pack(k, torch.ones_like(v), mask)
    assert keys.shape == (2, 2, 5, 16)
    assert deviation(values, torch.ones_like(values)) < 1e-12
    assert luna().pack(k, v, mask)[1].abs().max() < 10


def test_the_learned_sequence_is_drawn_from_the_generator_per_head() -> None:
    first, second = luna().packed, luna().packed
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert first.requires_grad
