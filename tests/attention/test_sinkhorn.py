"""Sinkhorn attention against loops over blocks, and its soft permutation."""

import math

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape
from attention.sparse.local import Local
from attention.sparse.sinkhorn import Sinkhorn
from tests.attention.conftest import deviation, draw, draw_qkv, padding

SHAPE = HeadShape(num_heads=2, head_dim=8, max_len=64)
BLOCK = 8


def _sinkhorn(num_iterations: int = 5, gumbel_noise: bool = False) -> Sinkhorn:
    module = Sinkhorn(
        SHAPE,
        torch.Generator().manual_seed(0),
        block_size=BLOCK,
        num_iterations=num_iterations,
        temperature=0.75,
        gumbel_noise=gumbel_noise,
    )
    return module.double().eval()


def _by_hand(permutation: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One query after the other: own block, then slot by slot of the sorted block, from Pi [B, H, N, N]."""
    out = torch.zeros_like(v)
    batch, heads, length, dim = v.shape
    for b, h, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(length)):
        a = i // BLOCK
        own = [j for j in range(a * BLOCK, min((a + 1) * BLOCK, length)) if not mask[b, j]]
        weights = [(q[b, h, i] @ k[b, h, j] / math.sqrt(dim)).exp() for j in own]
        values = [v[b, h, j] for j in own]
        for slot in range(BLOCK):
            members = [c * BLOCK + slot for c in range(-(-length // BLOCK))]
            members = [j for j in members if j < length and not mask[b, j]]
            share = sum(permutation[b, h, a, j // BLOCK] for j in members)
            if not members or share == 0:
                continue
            key = sum(permutation[b, h, a, j // BLOCK] * k[b, h, j] for j in members) / share
            weights.append(share * (q[b, h, i] @ key / math.sqrt(dim)).exp())
            values.append(sum(permutation[b, h, a, j // BLOCK] * v[b, h, j] for j in members) / share)
        if weights:
            out[b, h, i] = sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)
    return out


def _pi(module: Sinkhorn, k: Tensor, mask: Tensor) -> Tensor:
    """The log-domain iteration done on plain positive matrices of the real blocks."""
    batch, heads, length, _ = k.shape
    count = -(-length // BLOCK)
    pi = torch.zeros(batch, heads, count, count, dtype=k.dtype)
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        inside = [[j for j in range(c * BLOCK, min(length, (c + 1) * BLOCK)) if not mask[b, j]] for c in range(count)]
        real = [c for c in range(count) if inside[c]]
        pooled = torch.stack([k[b, h, inside[c]].sum(dim=0) for c in real])
        logits = (pooled @ module.weight[h] + module.bias[h])[:, real]
        matrix = (logits / module.temperature).exp()
        for _ in range(module.num_iterations):
            matrix = matrix / matrix.sum(dim=0, keepdim=True)
            matrix = matrix / matrix.sum(dim=1, keepdim=True)
        for row, c in enumerate(real):
            pi[b, h, c, real] = matrix[row]
    return pi


@pytest.mark.parametrize("length", [1, 8, 21])
def test_outputs_and_gradients_equal_the_definition(length: int) -> None:
    module = _sinkhorn()
    for mask in (torch.zeros(2, length, dtype=torch.bool), padding(length)):
        inputs = [x.requires_grad_() for x in draw_qkv(length, head_dim=8)]
        out = module(*inputs, mask)
        expected = _by_hand(_pi(module, inputs[1], mask), *inputs, mask)
        real = (~mask)[:, None, :, None].expand(out.shape)
        assert deviation(out[real], expected[real]) < 1e-10
        cotangent = draw(*out.shape, seed=7) * real
        sources = [*inputs, module.weight, module.bias]
        found, truth = (torch.autograd.grad((o * cotangent).sum(), sources) for o in (out, expected))
        assert all(deviation(a, b) < 1e-8 or b.abs().max() < 1e-12 for a, b in zip(found, truth, strict=True))


def test_enough_iterations_make_rows_and_columns_sum_to_one() -> None:
    pooled = draw(2, 2, 7, 8, seed=1, scale=2.0)
    real = torch.ones(2, 7, dtype=torch.bool)
    real[1, [2, 6]] = False
    pi = _sinkhorn(num_iterations=200).permutation(pooled, real)
    assert (pi.sum(dim=-1)[real[:, None].expand(-1, 2, -1)] - 1).abs().max() < 1e-12
    assert (pi.sum(dim=-2)[real[:, None].expand(-1, 2, -1)] - 1).abs().max() < 1e-3
    assert not pi[1, :, [2, 6]].any()
    assert not pi[1, :, :, [2, 6]].any()


def test_a_sharp_permutation_brings_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _sinkhorn()
    order = torch.tensor([3, 0, 4, 1, 2])
    hard = torch.eye(5, dtype=torch.float64)[order].expand(2, 2, -1, -1)
    monkeypatch.setattr(module, "permutation", lambda pooled, real: hard)
    q, k, v = draw_qkv(37, head_dim=8)
    mask = padding(37)
    block = torch.arange(37) // BLOCK
    out = module(q, k, v, mask)
    for b in range(2):
        for i in torch.nonzero(~mask[b]).flatten().tolist():
            own, brought = (torch.nonzero((block == c) & ~mask[b]).flatten() for c in (block[i], order[block[i]]))
            keys = torch.cat([own, brought])
            weights = (k[b][:, keys] @ q[b, :, i, :, None] / math.sqrt(8)).softmax(dim=1)  # [H, C, 1]
            assert deviation(out[b, :, i], (weights * v[b][:, keys]).sum(dim=1)) < 1e-12


def test_the_identity_permutation_is_local_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each own key is counted twice, which cancels."""
    module = _sinkhorn()
    monkeypatch.setattr(module, "permutation", lambda pooled, real: torch.eye(5).double().expand(2, 2, -1, -1))
    q, k, v = draw_qkv(37, head_dim=8)
    mask = padding(37)
    local = Local(SHAPE, torch.Generator(), block_size=BLOCK, overlap=0)
    assert deviation(module(q, k, v, mask), local(q, k, v, mask)) < 1e-12


def test_noise_is_added_in_training_only_and_only_on_request() -> None:
    inputs = draw_qkv(37, head_dim=8)
    for noisy in (False, True):
        module = _sinkhorn(gumbel_noise=noisy)
        assert torch.equal(module(*inputs), module(*inputs))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module.train()
            assert torch.equal(module(*inputs), module(*inputs)) is not noisy


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="temperature > 0"):
        Sinkhorn(SHAPE, torch.Generator(), block_size=8, num_iterations=5, temperature=0.0, gumbel_noise=False)
    with pytest.raises(ValueError, match="raise max_len"):
        _sinkhorn()(*draw_qkv(65, head_dim=8))


def test_a_vanishing_share_of_a_slot_keeps_gradients_finite(monkeypatch):
    """Training once died of it: 1 / share overflows where a slot's only real token has a share below 1e-38."""
    module = _sinkhorn().float()
    pi = torch.tensor([[1e-40, 1.0], [1.0, 1e-40]]).expand(1, SHAPE.num_heads, 2, 2).clone().requires_grad_()
    monkeypatch.setattr(module, "permutation", lambda pooled, real: pi)
    inputs = [x.float().requires_grad_() for x in draw_qkv(2 * BLOCK, batch=1, head_dim=SHAPE.head_dim)]
    mask = torch.zeros(1, 2 * BLOCK, dtype=torch.bool)
    mask[0, -3:] = True  # slots that only the other block fills
    gradients = torch.autograd.grad(module(*inputs, mask).sum(), [*inputs, pi])
    assert all(gradient.isfinite().all() for gradient in gradients)
