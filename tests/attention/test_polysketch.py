"""PolySketch: its bias in closed form, its sign, its sink, and the learned sketch's definition."""

import math

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape
from attention.feature_maps.polysketch import LearnedSketch, PolySketch
from attention.linear import LinearAttention
from attention.normalizers import Normalizer
from tests.attention.conftest import deviation, draw, draw_qkv, padding

SHAPE = HeadShape(num_heads=2, head_dim=4, max_len=64)


def sketch(*, degree=4, sketch_dim=8, learned=False, layer_norm=True, seed=0, shape=SHAPE) -> PolySketch:
    if learned:
        torch.manual_seed(seed)  # for nn.Linear
    return PolySketch(
        shape,
        torch.Generator().manual_seed(seed),
        degree=degree,
        sketch_dim=sketch_dim,
        learned=learned,
        layer_norm=layer_norm,
    ).double()


def estimate(module: PolySketch, x: Tensor, y: Tensor) -> Tensor:
    """phi(x).phi(y) for scaled x, y [..., D]."""
    unscaled = module.head_dim**0.25
    shape = (1, 1, -1, module.head_dim)
    return (module(x.view(shape) * unscaled, True).values * module(y.view(shape) * unscaled, False).values).sum(-1)


def unit_pair(t: float) -> tuple[Tensor, Tensor]:
    x, y = torch.zeros(2, 4, dtype=torch.float64)
    x[0], y[0], y[1] = 1.0, t, math.sqrt(1 - t * t)
    return x, y


@pytest.mark.parametrize(("degree", "sketch_dim", "draws"), [(4, 4, 2500), (4, 16, 2500)])
def test_the_mean_of_the_random_sketch_is_its_closed_form(degree: int, sketch_dim: int, draws: int) -> None:
    """5.5 standard errors: a false alarm has probability below 1e-6, and the seeds are fixed."""
    x, y = draw(2, 4, seed=3, scale=0.7)
    values = torch.cat(
        [
            estimate(sketch(degree=degree, sketch_dim=sketch_dim, layer_norm=False, seed=seed), x, y).flatten()
            for seed in range(draws)
        ]
    )
    module = sketch(degree=degree, sketch_dim=sketch_dim)
    error = abs(values.mean() - module.kernel(x, y))
    assert error < 5.5 * values.std() / math.sqrt(draws)
    # sharp enough to tell the bias from the unbiased power
    assert abs(values.mean() - (x @ y) ** degree) > 5.5 * values.std() / math.sqrt(draws)


def test_the_mean_holds_through_two_levels() -> None:
    """The upper level's mean given the lower sketches is that of degree 4, tested above; so only the lower level is
    drawn, many times along a batch axis of its buffers. A direct mean has too heavy tails to tell anything.
    6 standard errors of the linearised statistic: a false alarm has probability below 1e-8, and the seed is fixed."""
    draws, dim = 200_000, 8
    module, generator = sketch(degree=8, sketch_dim=dim, layer_norm=False), torch.Generator().manual_seed(1)
    lower = module.sketch.left
    for name in ("left_matrix", "right_matrix"):
        setattr(lower, name, torch.randn(draws, 4, dim, generator=generator, dtype=torch.float64))
    x, y = draw(2, 4, seed=3, scale=0.5)
    for a, b in ((x, x + 0.3 * y), (x, x)):
        m_a, m_b = (lower(z.expand(draws, 1, 4)).squeeze(1) for z in (a, b))
        squares, norms = (m_a * m_b).sum(-1) ** 2, m_a.square().sum(-1) * m_b.square().sum(-1)
        square, fourth = squares.mean(), (norms + 2 * squares).mean()
        mean = square**2 + (fourth**2 - square**2) / dim
        slope = 2 * square * (1 - 1 / dim) * squares + 2 * fourth / dim * (norms + 2 * squares)
        error = slope.std() / math.sqrt(draws)
        assert abs(mean - module.kernel(a, b)) < 6 * error
        assert error < 0.02 * mean


def test_the_bias_has_its_golden_values() -> None:
    x, y = unit_pair(0.6)
    assert sketch(sketch_dim=16).kernel(x, y) == pytest.approx(0.6**4 + (1.72**2 - 0.6**4) / 16, rel=1e-12)
    orthogonal = sketch(sketch_dim=32).kernel(*unit_pair(0.0))
    assert orthogonal == pytest.approx(1 / 32, rel=1e-12)  # the floor under every weight
    wide = sketch(degree=8)
    wide.sketch_dim = 10**9  # the formula alone: the matrices would not fit
    assert wide.kernel(x, y) == pytest.approx(0.6**8, rel=1e-5)


def test_weights_are_never_negative() -> None:
    q, k, _ = draw_qkv(37, head_dim=4, scale=2.0)
    for module in (sketch(), sketch(degree=8), sketch(learned=True), sketch(degree=8, learned=True)):
        weights = module(q, True).values @ module(k, False).values.transpose(-2, -1)
        assert weights.min() > -1e-12 * weights.max()
        assert module(q, True).values.shape[-1] == module.num_outputs == 36


def test_degree_two_is_exact_with_the_shared_norm_and_the_sink() -> None:
    feature_map = sketch(degree=2, sketch_dim=None)
    with torch.no_grad():
        feature_map.norm.weight.copy_(1 + draw(4, seed=3))
        feature_map.norm.bias.copy_(draw(4, seed=4))
    module = LinearAttention(
        SHAPE, torch.Generator(), feature_map=lambda *_: feature_map, normalizer=Normalizer("sum_plus", 1.0)
    )
    q, k, v = draw_qkv(37, head_dim=4)
    mask = padding(37)
    x, y = (
        (z - z.mean(-1, keepdim=True))
        / (z.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        * feature_map.norm.weight
        + feature_map.norm.bias
        for z in (q, k)
    )
    weights = (x @ y.transpose(-2, -1) / 2) ** 2 * ~mask[:, None, None, :]
    assert deviation(module(q, k, v, mask), weights @ v / (1 + weights.sum(dim=-1, keepdim=True))) < 1e-10


def test_a_degree_eight_sketch_draws_three_independent_pairs() -> None:
    matrices = [buffer.flatten() for buffer in sketch(degree=8, sketch_dim=4).buffers()]
    assert len(matrices) == 6
    assert len({tuple(matrix.tolist()) for matrix in matrices}) == 6


def test_the_learned_sketch_is_a_bounded_product_of_networks() -> None:
    module = sketch(degree=8, learned=True, sketch_dim=5).sketch
    x = draw(3, 4, seed=1)

    def level(part: LearnedSketch, left: Tensor, right: Tensor) -> Tensor:
        f, g = (
            net[3](torch.nn.functional.gelu(net[1](torch.nn.functional.layer_norm(z, z.shape[-1:]))))
            for net, z in ((part.left_network, left), (part.right_network, right))
        )
        return math.sqrt(5) * torch.tanh(f * g / math.sqrt(5))

    expected = level(module, level(module.left, x, x), level(module.right, x, x))
    assert deviation(module(x), expected) < 1e-12
    assert module(100 * x).abs().max() <= math.sqrt(5)
    assert module.left_network[1].out_features == 40


def test_the_learned_sketch_trains_every_parameter() -> None:
    feature_map = sketch(degree=8, learned=True)
    module = LinearAttention(
        SHAPE, torch.Generator(), feature_map=lambda *_: feature_map, normalizer=Normalizer("sum_plus", 1.0)
    )
    module(*draw_qkv(37, head_dim=4)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_settings_that_would_do_nothing_are_refused() -> None:
    for wrong in (
        {"degree": 3},
        {"degree": 2},
        {"degree": 2, "sketch_dim": None, "learned": True},
        {"sketch_dim": None},
    ):
        with pytest.raises(ValueError, match="PolySketch"):
            sketch(**wrong)
    with pytest.raises(NotImplementedError):
        sketch(learned=True).kernel(*unit_pair(0.5))
