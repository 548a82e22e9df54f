"""Skyformer: its definition and limits, and landmarks that are real positions whatever the padding."""

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape
from attention.kernelized import GaussianAttention
from attention.low_rank.real_keys import RealPositions, draw_integers
from attention.low_rank.skyformer import Skyformer
from tests.attention.conftest import deviation, draw, draw_qkv, padding

LENGTH, SHAPE = 37, HeadShape(2, 16, 64)


def skyformer(*, num_landmarks=12, ridge=0.1, num_iterations=6) -> Skyformer:
    return Skyformer(
        SHAPE, torch.Generator().manual_seed(0), num_landmarks=num_landmarks, ridge=ridge, num_iterations=num_iterations
    ).double()


def with_every_row_a_landmark(ridge: float) -> Skyformer:
    module = skyformer(num_landmarks=2 * LENGTH, ridge=ridge, num_iterations=40)
    ranks = torch.arange(LENGTH)
    module.draws.copy_(((ranks * 2**31) // LENGTH + 1).expand(2, -1))
    assert RealPositions.of(torch.zeros(1, 1, LENGTH, 1), None).drawn(module.draws)[0, 0].tolist() == ranks.tolist()
    return module


def definition(module: Skyformer, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """One example and head at a time, with the true inverse."""
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        real = (~mask[b]).nonzero().flatten()
        picks = [real[[int(draw) * len(real) // 2**31 for draw in half]] for half in module.draws]
        for h in range(q.shape[1]):
            x, y = q[b, h] * 16**-0.25, k[b, h] * 16**-0.25
            z = torch.cat([x[picks[0]], y[picks[1]]])

            def gauss(a: Tensor, c: Tensor) -> Tensor:
                return (-(a[:, None] - c[None]).square().sum(dim=-1) / 2).exp()

            gram = gauss(z, z) + module.ridge * torch.eye(len(z), dtype=z.dtype)
            out[b, h] = gauss(x, z) @ torch.linalg.inv(gram) @ gauss(z, y[real]) @ v[b, h, real]
    return out


def test_outputs_and_gradients_are_those_of_the_definition() -> None:
    module = skyformer(num_iterations=30)
    inputs = [x.requires_grad_() for x in draw_qkv(LENGTH, scale=1.0)]
    mask = padding(LENGTH)
    real = ~mask[:, None, :, None]
    fast, slow = module(*inputs, mask) * real, definition(module, *inputs, mask) * real
    assert deviation(fast, slow) < 1e-9
    probe = draw(*fast.shape, seed=7)
    for actual, expected in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        assert deviation(actual, expected) < 1e-8


def test_all_rows_as_landmarks_and_no_ridge_is_gaussian_attention() -> None:
    inputs = draw_qkv(LENGTH, scale=1.0)
    exact = GaussianAttention(SHAPE, torch.Generator())(*inputs, None)
    errors = [deviation(with_every_row_a_landmark(ridge)(*inputs, None), exact) for ridge in (0.1, 1e-2, 1e-4)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[0] < 0.1
    assert errors[2] < 1e-6


def test_the_iteration_inverts_the_ridged_gram_matrix() -> None:
    module = skyformer(num_iterations=12)
    points = draw(1, 2, 30, 4, seed=1, scale=1.0)
    gram = (-(torch.cdist(points, points) ** 2) / 2).exp()
    exact = torch.linalg.inv(gram + 0.1 * torch.eye(30, dtype=gram.dtype))
    assert deviation(module.inverse(gram), exact) < 1e-10


def test_repeated_landmarks_stay_finite() -> None:
    module = skyformer(num_landmarks=64).float()
    q, k, v = (x.requires_grad_() for x in draw_qkv(3, dtype=torch.float32))
    out = module(q, k, v, torch.tensor([[False, True, True], [False, False, True]]))
    out.square().sum().backward()
    assert out.isfinite().all()
    assert q.grad.isfinite().all()


def test_landmarks_are_uniform_over_real_positions_anywhere() -> None:
    """5.5 standard deviations per count: a false alarm has probability below 1e-7 each, and the seed is fixed."""
    draws = draw_integers((20_000,), torch.Generator().manual_seed(4))
    mask = padding(LENGTH)
    mask[1, 0] = True
    positions = RealPositions.of(torch.zeros(2, 1, LENGTH, 1), mask).drawn(draws)
    for b in range(2):
        counts = torch.bincount(positions[b], minlength=LENGTH).double()
        assert not counts[mask[b]].any()
        share = 1 / int((~mask[b]).sum())
        spread = (20_000 * share * (1 - share)) ** 0.5
        assert ((counts[~mask[b]] - 20_000 * share).abs() < 5.5 * spread).all()


def test_landmarks_survive_casts_and_training_mode() -> None:
    module, inputs = skyformer(), draw_qkv(LENGTH)
    before, draws = module.eval()(*inputs, None), module.draws.clone()
    assert torch.equal(module.train()(*inputs, None), before)
    assert torch.equal(module.bfloat16().draws, draws)


def test_an_odd_number_of_landmarks_and_cross_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="even"):
        skyformer(num_landmarks=7)
    q, k, v = draw_qkv(LENGTH)
    with pytest.raises(ValueError, match="self-attention"):
        skyformer()(q[:, :, :5], k, v)
