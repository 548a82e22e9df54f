"""Nystromformer: its segments, its inverse, its exact limits and its convolution."""

import pytest
import torch
from torch import Tensor, nn

from attention.base import HeadShape
from attention.low_rank.depthwise import DepthwiseConvolution
from attention.low_rank.nystromformer import Nystromformer, segment_means
from attention.low_rank.pinv import hyper_power_inverse
from attention.softmax import softmax_attention
from tests.attention.conftest import deviation, draw, draw_qkv, padding

LENGTH = 37


def nystromformer(*, num_landmarks=8, num_iterations=6, conv_kernel=None) -> Nystromformer:
    torch.manual_seed(0)  # for the convolution
    return Nystromformer(
        HeadShape(2, 16, 64),
        torch.Generator(),
        num_landmarks=num_landmarks,
        num_iterations=num_iterations,
        conv_kernel=conv_kernel,
    ).double()


def segments_of(positions: Tensor, num_segments: int) -> list[Tensor]:
    """Split real positions into consecutive runs: token r belongs to segment floor(r m / N)."""
    count = len(positions)
    return [positions[[r for r in range(count) if r * num_segments // count == s]] for s in range(num_segments)]


def definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, num_landmarks: int) -> Tensor:
    """One example and head at a time, real positions only, with the true pseudo-inverse."""
    out = torch.zeros_like(v)
    for b in range(q.shape[0]):
        real = (~mask[b]).nonzero().flatten()
        runs = [run for run in segments_of(real, num_landmarks) if len(run)]
        for h in range(q.shape[1]):
            x, y = q[b, h] * 16**-0.25, k[b, h] * 16**-0.25
            lq, lk = (torch.stack([z[run].mean(dim=0) for run in runs]) for z in (x, y))
            inverse = torch.linalg.pinv((lq @ lk.T).softmax(dim=-1))
            out[b, h] = (x @ lk.T).softmax(-1) @ inverse @ ((lq @ y[real].T).softmax(-1) @ v[b, h, real])
    return out


def test_segments_are_balanced_runs_of_real_positions() -> None:
    mask = torch.zeros(4, LENGTH, dtype=torch.bool)
    mask[0, 30:] = True
    mask[1, 10:16] = True
    mask[2] = torch.rand(LENGTH, generator=torch.Generator().manual_seed(2)) < 0.5
    mask[2, 0] = True
    mask[3, 5:] = True  # fewer real positions than segments
    averages, empty = segment_means(torch.zeros(4, 1, LENGTH, 2), 8, mask)
    for b in range(4):
        runs = segments_of((~mask[b]).nonzero().flatten(), 8)
        sizes = [len(run) for run in runs]
        assert max(sizes) - min(sizes) <= 1
        assert empty[b].tolist() == [size == 0 for size in sizes]
        expected = torch.zeros(8, LENGTH)
        for segment, run in enumerate(runs):
            expected[segment, run] = 1 / max(len(run), 1)
        assert torch.equal(averages[b, 0], expected)


@pytest.mark.parametrize("length", [LENGTH, 7])  # more and fewer positions than landmarks
def test_the_converged_mechanism_is_its_definition(length: int) -> None:
    module = nystromformer(num_iterations=40)
    inputs = [x.requires_grad_() for x in draw_qkv(length, scale=2.0)]
    mask = padding(length)
    real = ~mask[:, None, :, None]
    fast, slow = module(*inputs, mask) * real, definition(*inputs, mask, 8) * real
    assert deviation(fast, slow) < 1e-8
    probe = draw(*fast.shape, seed=7)
    for actual, expected in zip(
        torch.autograd.grad((fast * probe).sum(), inputs),
        torch.autograd.grad((slow * probe).sum(), inputs),
        strict=True,
    ):
        assert deviation(actual, expected) < 1e-6


def test_as_many_landmarks_as_positions_is_exact_softmax() -> None:
    q, k, v = draw_qkv(LENGTH, scale=2.0)
    mask = padding(LENGTH)
    real = ~mask[:, None].expand(-1, 2, -1)
    expected = softmax_attention(q, k, v, mask)[real]
    errors = [
        deviation(nystromformer(num_landmarks=64, num_iterations=steps)(q, k, v, mask)[real], expected)
        for steps in (6, 12, 30)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-6


def test_surplus_landmarks_change_nothing_even_before_convergence() -> None:
    inputs, mask = draw_qkv(LENGTH, scale=2.0), padding(LENGTH)
    real = ~mask[:, None].expand(-1, 2, -1)
    fewer, more = (nystromformer(num_landmarks=m)(*inputs, mask)[real] for m in (LENGTH, 64))
    assert deviation(more, fewer) < 1e-10


def test_constant_values_pass_once_the_inverse_has_converged() -> None:
    q, k, v = draw_qkv(LENGTH, scale=2.0)
    out = nystromformer(num_iterations=40)(q, k, torch.ones_like(v), None)
    assert deviation(out, torch.ones_like(v)) < 1e-8


def test_the_iteration_converges_to_the_pseudo_inverse() -> None:
    matrix = draw(3, 20, 20, seed=1, scale=3.0).softmax(dim=-1)
    exact = torch.linalg.pinv(matrix)
    errors = [deviation(hyper_power_inverse(matrix, steps), exact) for steps in (2, 6, 25)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-9
    low_rank = draw(20, 6, seed=2, scale=1.0) @ draw(6, 20, seed=3, scale=1.0)
    # rank 6, so not an inverse; rounding grows slowly in the null space, hence no more steps than needed
    assert deviation(hyper_power_inverse(low_rank, 10), torch.linalg.pinv(low_rank)) < 1e-6


def test_a_matrix_is_inverted_the_same_beside_any_other() -> None:
    matrix = draw(1, 8, 8, seed=1, scale=3.0).softmax(dim=-1)
    together = hyper_power_inverse(torch.cat([matrix, 1000 * matrix]), 6)
    assert deviation(together[:1], hyper_power_inverse(matrix, 6)) < 1e-12


def test_the_convolution_is_depthwise_over_real_values() -> None:
    module, plain = nystromformer(conv_kernel=5), nystromformer()
    inputs, mask = draw_qkv(LENGTH), padding(LENGTH)
    v = inputs[2].masked_fill(mask[:, None, :, None], 0.0)
    expected = torch.zeros_like(v)
    for i in range(LENGTH):
        for offset in range(-2, 3):
            if 0 <= i + offset < LENGTH:
                expected[:, :, i] += module.conv.weight[:, 0, offset + 2, 0][:, None] * v[:, :, i + offset]
    assert deviation(module(*inputs, mask) - plain(*inputs, mask), expected) < 1e-10


@pytest.mark.parametrize(("length", "width"), [(37, 5), (3, 33), (128, 65), (64, 1)])
def test_the_convolution_by_transforms_is_the_one_by_sums(length: int, width: int) -> None:
    ours = DepthwiseConvolution(3, width).double()
    by_sums = nn.Conv2d(3, 3, (width, 1), padding=(width // 2, 0), groups=3, bias=False).double()
    by_sums.load_state_dict(ours.state_dict())
    x, upstream = draw(2, 3, length, 4, seed=1).requires_grad_(), draw(2, 3, length, 4, seed=2)
    gradients = []
    for module in (ours, by_sums):
        out = module(x)
        gradients.append((out, *torch.autograd.grad((out * upstream).sum(), [x, module.weight])))
    for mine, expected in zip(*gradients, strict=True):
        assert deviation(mine, expected) < 1e-12
    out = ours.float()(single := x.detach().float().requires_grad_())
    in_single = out, *torch.autograd.grad((out * upstream.float()).sum(), [single, ours.weight])
    for mine, expected in zip(in_single, gradients[1], strict=True):  # PyTorch's own weights miss this at width 65
        assert deviation(mine, expected) < 1e-5
    assert ours(x.bfloat16()).dtype == torch.bfloat16


def test_the_convolution_starts_as_pytorchs() -> None:
    torch.manual_seed(0)
    ours = DepthwiseConvolution(2, 33).weight
    torch.manual_seed(0)
    theirs = nn.Conv2d(2, 2, (33, 1), groups=2, bias=False).weight
    assert deviation(ours, theirs) < 1e-7


def test_an_even_convolution_and_cross_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="odd"):
        nystromformer(conv_kernel=4)
    q, k, v = draw_qkv(LENGTH)
    with pytest.raises(ValueError, match="self-attention"):
        nystromformer()(q[:, :, :5], k, v)
