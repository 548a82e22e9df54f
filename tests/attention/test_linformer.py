"""Linformer: its exact limits, its mask, and which parameters exist and train."""

import math

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape
from attention.low_rank.linformer import Linformer
from attention.softmax import softmax_attention
from tests.attention.conftest import deviation, draw, draw_qkv, padding

LENGTH = 37


def linformer(*, projected_len=5, share_heads=False, share_keys_values=False, max_len=LENGTH) -> Linformer:
    return Linformer(
        HeadShape(2, 16, max_len),
        torch.Generator().manual_seed(0),
        projected_len=projected_len,
        share_heads=share_heads,
        share_keys_values=share_keys_values,
        init_std=0.3,
    ).double()


def with_projection(projection: Tensor) -> Linformer:
    """E = F = `projection` [k, max_len] in both heads."""
    module = linformer(projected_len=projection.shape[0], share_keys_values=True)
    with torch.no_grad():
        module.project_keys.copy_(projection.expand_as(module.project_keys))
    return module


def test_the_identity_projection_is_exact_softmax() -> None:
    q, k, v = draw_qkv(LENGTH, scale=2.0)
    assert deviation(with_projection(torch.eye(LENGTH))(q, k, v), softmax_attention(q, k, v, None)) < 1e-12


def test_a_pooling_projection_is_softmax_over_block_means() -> None:
    q, k, v = draw_qkv(LENGTH - 1)
    pooling = torch.block_diag(*[torch.full((1, 4), 0.25)] * 9)
    pooling = torch.cat([pooling, torch.zeros(9, 1)], dim=1)
    means = (x.unflatten(2, (9, 4)).mean(dim=3) for x in (k, v))
    assert deviation(with_projection(pooling)(q, k, v), softmax_attention(q, *means, None)) < 1e-12


@pytest.mark.parametrize("share_keys_values", [True, False])
@pytest.mark.parametrize("share_heads", [True, False])
def test_outputs_and_gradients_are_those_of_the_definition(share_heads: bool, share_keys_values: bool) -> None:
    module = linformer(share_heads=share_heads, share_keys_values=share_keys_values, max_len=64)
    inputs = [x.requires_grad_() for x in draw_qkv(LENGTH)]
    mask = padding(LENGTH)
    fast, slow = module(*inputs, mask), torch.zeros(2, 2, LENGTH, 16, dtype=torch.float64)
    q, k, v = inputs
    values = module.project_keys if share_keys_values else module.project_values
    for b in range(2):
        real = (~mask[b]).nonzero().flatten()
        for h in range(2):
            e, f = (matrix[0 if share_heads else h][:, real] for matrix in (module.project_keys, values))
            logits = q[b, h] @ (e @ k[b, h, real]).T / math.sqrt(16)
            slow[b, h] = logits.softmax(dim=-1) @ (f @ v[b, h, real])
    assert deviation(fast, slow) < 1e-12
    wanted, probe = [*inputs, *module.parameters()], draw(*fast.shape, seed=7)
    for actual, expected in zip(
        torch.autograd.grad((fast * probe).sum(), wanted),
        torch.autograd.grad((slow * probe).sum(), wanted),
        strict=True,
    ):
        assert deviation(actual, expected) < 1e-10


@pytest.mark.parametrize(
    ("share_heads", "share_keys_values", "count"),
    [(False, False, 4), (True, False, 2), (False, True, 2), (True, True, 1)],
)
def test_projections_are_registered_parameters(share_heads: bool, share_keys_values: bool, count: int) -> None:
    module = linformer(share_heads=share_heads, share_keys_values=share_keys_values)
    assert sum(p.numel() for p in module.parameters()) == count * 5 * LENGTH
    assert all(p.is_leaf and p.requires_grad for p in module.parameters())
    assert set(module.state_dict()) == {name for name, _ in module.named_parameters()}


def test_only_the_columns_of_positions_in_use_receive_gradients() -> None:
    module = linformer(share_keys_values=True, max_len=64)
    module(*draw_qkv(LENGTH)).square().sum().backward()
    used = module.project_keys.grad.abs().amax(dim=(0, 1)) > 0
    assert used[:LENGTH].all()
    assert not used[LENGTH:].any()


def test_rows_that_sum_to_one_pass_constant_values() -> None:
    module, (q, k, v) = linformer(), draw_qkv(LENGTH)
    with torch.no_grad():
        module.project_values.div_(module.project_values.sum(dim=-1, keepdim=True))
    assert deviation(module(q, k, torch.ones_like(v)), torch.ones_like(v)) < 1e-10


def test_a_sequence_beyond_max_len_is_refused() -> None:
    with pytest.raises(ValueError, match="max_len"):
        linformer()(*draw_qkv(LENGTH + 1))
