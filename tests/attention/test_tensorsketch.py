"""TensorSketch: its definition over tensors of indices, its mean and its exact variance."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape
from attention.feature_maps.tensorsketch import TensorSketch
from attention.linear import LinearAttention
from attention.normalizers import Normalizer
from tests.attention.conftest import deviation, draw

SHAPE = HeadShape(num_heads=1, head_dim=4, max_len=16)


def sketch(*, degree: int, num_features: int, offset=0.5, unit_norm=False, seed=0) -> TensorSketch:
    return TensorSketch(
        SHAPE,
        torch.Generator().manual_seed(seed),
        degree=degree,
        offset=offset,
        num_features=num_features,
        unit_norm=unit_norm,
    ).double()


def features(module: TensorSketch, x: Tensor) -> Tensor:
    """phi of scaled x [D] -> [F]."""
    return module(x.view(1, 1, 1, -1) / module.scale, True).values.flatten()


@pytest.mark.parametrize("num_features", [7, 8])
def test_features_are_signed_sums_over_tensors_of_indices(num_features: int) -> None:
    module, x = sketch(degree=3, num_features=num_features), draw(4, seed=1)
    bucket, sign = module.sketches.abs().argmax(dim=-1), module.sketches.sum(dim=-1)  # [p, D + 1]
    assert (module.sketches.abs().sum(dim=-1) == 1).all()
    extended = torch.cat([x, x.new_tensor([math.sqrt(0.5)])])
    expected = torch.zeros(num_features, dtype=torch.float64)
    for indices in itertools.product(range(5), repeat=3):
        place = sum(int(bucket[level, i]) for level, i in enumerate(indices)) % num_features
        expected[place] += math.prod(float(sign[level, i] * extended[i]) for level, i in enumerate(indices))
    assert deviation(features(module, x), expected) < 1e-12


@pytest.mark.parametrize(("degree", "num_features"), [(1, 4), (2, 5), (2, 2), (3, 8), (2, 1)])
def test_the_estimate_has_its_closed_form_mean_and_variance(degree: int, num_features: int) -> None:
    """5.5 standard errors: a false alarm has probability below 1e-6 per comparison, and the seeds are fixed."""
    x, y = draw(2, 4, seed=3)
    aligned = torch.tensor([0.5, 0.5, 0.4, 0.6], dtype=torch.float64)
    draws = 4000
    modules = [sketch(degree=degree, num_features=num_features, seed=seed) for seed in range(draws)]
    phi_x, phi_y, phi_aligned = (torch.stack([features(module, z) for module in modules]) for z in (x, y, aligned))
    for a, b, values in ((x, y, (phi_x * phi_y).sum(-1)), (aligned, aligned, (phi_aligned**2).sum(-1))):
        mean, variance = modules[0].kernel(a, b), modules[0].variance(a, b)
        assert abs(values.mean() - mean) < 5.5 * math.sqrt(variance / draws)
        squares = (values - mean) ** 2
        assert abs(squares.mean() - variance) < 5.5 * squares.std() / math.sqrt(draws)


def test_degree_one_varies_as_a_rademacher_projection() -> None:
    x, y = draw(2, 4, seed=3)
    expected = (x @ x) * (y @ y) + (x @ y) ** 2 - 2 * (x**2 * y**2).sum()
    assert sketch(degree=1, num_features=9, offset=0.0).variance(x, y) == pytest.approx(float(expected) / 9, rel=1e-12)


def test_one_bucket_is_a_single_feature() -> None:
    module = sketch(degree=3, num_features=1)
    x, y = draw(2, 4, seed=3)
    assert deviation(module.variance(x, y), module.second_moment(x, y) - module.kernel(x, y) ** 2) < 1e-12


def test_the_variance_stays_below_the_published_bound() -> None:
    x, y = draw(2, 500, 4, seed=4, scale=1.0)
    for degree in (1, 2, 3, 4):
        module = sketch(degree=degree, num_features=16, offset=0.0)
        bound = (2 + 3**degree) * ((x**2).sum(-1) * (y**2).sum(-1)) ** degree / 16
        assert (module.variance(x, y) <= bound).all()


def test_unit_norm_makes_the_kernel_one_of_the_cosine() -> None:
    module, x = sketch(degree=2, num_features=8, unit_norm=True), draw(1, 1, 5, 4, seed=1)
    assert deviation(module(7 * x, True).values, module(x, True).values) < 1e-12
    zero = torch.zeros(1, 1, 1, 4, dtype=torch.float64, requires_grad=True)
    module(zero, True).values.sum().backward()
    assert zero.grad.isfinite().all()


def test_an_unguarded_sum_is_refused() -> None:
    with pytest.raises(ValueError, match="signed"):
        LinearAttention(
            SHAPE,
            torch.Generator(),
            feature_map=lambda *_: sketch(degree=2, num_features=8),
            normalizer=Normalizer("sum"),
        )
    with pytest.raises(ValueError, match="degree"):
        sketch(degree=0, num_features=8)
