"""Reformer against a loop over positions, and the properties of its hash."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from attention.base import HeadShape
from attention.sparse.reformer import Reformer
from tests.attention.conftest import dense_attention, deviation, draw, draw_qkv, padding

SHAPE = HeadShape(num_heads=2, head_dim=8, max_len=64)


def _reformer(num_hashes: int = 2, chunk_size: int = 8, shape: HeadShape = SHAPE) -> Reformer:
    generator = torch.Generator().manual_seed(0)
    module = Reformer(shape, generator, num_hashes=num_hashes, chunk_size=chunk_size, buckets_per_chunk=2)
    return module.double()


def _allowed(module: Reformer, q: Tensor, mask: Tensor) -> Tensor:
    """[B, H, L, L]: a real key in the same or the previous chunk of any round; itself only if that is all."""
    batch, heads, length, _ = q.shape
    allowed = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b in range(batch):
        real = [i for i in range(length) if not mask[b, i]]
        for h in range(heads):
            for rotation in module.rotations[h]:  # [D, buckets / 2]
                rotated = q[b, h] @ rotation
                bucket = torch.cat([rotated, -rotated], dim=-1).argmax(dim=-1).tolist()
                order = sorted(real, key=lambda i: (bucket[i], i))
                chunk = {i: rank // module.chunk_size for rank, i in enumerate(order)}
                for i in real:
                    for j in real:
                        allowed[b, h, i, j] |= i != j and chunk[i] - chunk[j] in (0, 1)
            for i in real:
                allowed[b, h, i, i] = not allowed[b, h, i].any()
    return allowed


def _shared_logits(q: Tensor) -> Tensor:
    return q @ functional.normalize(q, dim=-1).transpose(-2, -1)


@pytest.mark.parametrize("num_hashes", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 9, 40, 53])
def test_outputs_and_gradients_equal_softmax_over_the_union_of_all_rounds(num_hashes: int, length: int) -> None:
    module = _reformer(num_hashes)
    for mask in (torch.zeros(2, length, dtype=torch.bool), padding(length)):
        q, k, v = draw_qkv(length, head_dim=8, scale=1.0)
        q, v = q.requires_grad_(), v.requires_grad_()
        expected = dense_attention(_shared_logits(q), v, _allowed(module, q.detach(), mask))
        out = module(q, k, v, mask)
        real = (~mask)[:, None, :, None].expand(out.shape)
        assert deviation(out[real], expected[real]) < 1e-9
        cotangent = draw(*out.shape, seed=7) * real
        found, truth = (torch.autograd.grad((o * cotangent).sum(), (q, v)) for o in (out, expected))
        assert all(deviation(a, b) < 1e-8 or b.abs().max() < 1e-12 for a, b in zip(found, truth, strict=True))


def test_the_pattern_is_sparse_here() -> None:
    """Otherwise the comparison above would say nothing about buckets and chunks."""
    q, _, _ = draw_qkv(53, head_dim=8, scale=1.0)
    share = _allowed(_reformer(2), q, torch.zeros(2, 53, dtype=torch.bool)).double().mean()
    assert 0.2 < share < 0.6


@pytest.mark.parametrize("num_hashes", [1, 3])
def test_one_chunk_is_exact_shared_softmax_without_itself(num_hashes: int) -> None:
    q, k, v = draw_qkv(37, head_dim=8, scale=1.0)
    mask = padding(37)
    allowed = ~torch.eye(37, dtype=torch.bool) & ~mask[:, None, None]
    out = _reformer(num_hashes, chunk_size=64)(q, k, v, mask)
    expected = dense_attention(_shared_logits(q), v, allowed)
    assert deviation(out.transpose(1, 2)[~mask], expected.transpose(1, 2)[~mask]) < 1e-9


def test_a_position_alone_attends_to_itself() -> None:
    q, k, v = draw_qkv(5, head_dim=8)
    mask = torch.tensor([[True, True, False, True, True]] * 2)
    assert deviation(_reformer()(q, k, v, mask)[:, :, 2], v[:, :, 2]) < 1e-12


def test_a_repeated_round_changes_nothing() -> None:
    one, two = _reformer(1), _reformer(2)
    two.rotations.copy_(one.rotations.expand_as(two.rotations))
    q, k, v = draw_qkv(53, head_dim=8)
    assert deviation(two(q, k, v), one(q, k, v)) < 1e-10


def test_the_keys_of_the_slot_are_not_used() -> None:
    q, k, v = draw_qkv(53, head_dim=8)
    assert torch.equal(_reformer()(q, k, v), _reformer()(q, -k, v))


def test_the_hash_ignores_the_length_of_a_vector() -> None:
    module = _reformer(4)
    x = draw(2, 2, 37, 8, seed=1)
    lengths = 10.0 ** draw(2, 2, 37, 1, seed=2, scale=1.0)
    assert torch.equal(module.buckets(x), module.buckets(x * lengths))
    assert module.buckets(x).unique().numel() == 16  # 64 / 8 chunks, 2 buckets each: all in use


def test_two_buckets_separate_vectors_in_proportion_to_their_angle() -> None:
    """P(same bucket) = 1 - angle / pi over 4000 rounds: 5.5 standard errors, false alarm below 1e-7."""
    module = _reformer(4000, chunk_size=64, shape=HeadShape(1, 8, 64))
    for angle in (0.3, 1.5, 2.8):
        x = torch.zeros(1, 1, 2, 8, dtype=torch.float64)
        x[..., 0, 0] = 1
        x[..., 1, 0], x[..., 1, 1] = math.cos(angle), math.sin(angle)
        buckets = module.buckets(x)  # [1, 1, R, 2]
        found = (buckets[..., 0] == buckets[..., 1]).double().mean()
        expected = 1 - angle / math.pi
        assert abs(found - expected) < 5.5 * math.sqrt(expected * (1 - expected) / 4000)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="even buckets_per_chunk"):
        Reformer(SHAPE, torch.Generator(), num_hashes=2, chunk_size=8, buckets_per_chunk=3)
