"""Random Maclaurin features: unbiasedness and exact variances, the fast evaluation against the definition, exact parts.

Statistical tests compare a mean over R draws with its closed form at 5.2 standard errors: false alarm 2e-7 each. All
seeds are fixed, so that a test that passes keeps passing.
"""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from attention.base import HeadShape
from attention.feature_maps.degrees import Counts, DegreeLaw, Geometric, KernelLaw, Optimal, isotropic_moment
from attention.feature_maps.maclaurin import Maclaurin, maclaurin_features_naive
from attention.kernels import Exp, Inverse, Kernel, Log, Sqrt
from attention.projections.signs import SRHT, ComplexRademacher, Haar, MonomialLaw, Rademacher
from tests.attention.conftest import draw

PUBLISHED = Geometric(base=2.0, max_degree=20, sampling="iid")
# golden pair: t = .15, rho = .2092 (Rademacher)
X = torch.tensor([0.5, -0.2, 0.1, 0.4], dtype=torch.float64)
Y = torch.tensor([0.3, 0.1, -0.6, 0.2], dtype=torch.float64)


class Polynomial(Kernel):
    """sum of coefficients[n] t^n: for tests only."""

    radius = math.inf

    def __init__(self, coefficients: Mapping[int, float]) -> None:
        self.coefficients = coefficients

    def exact(self, t: Tensor) -> Tensor:
        return self.series(t, list(self.coefficients))

    def coefficient(self, n: int) -> float:
        return self.coefficients.get(n, 0.0)


def maclaurin(
    num_features: int = 128,
    *,
    kernel: Kernel | None = None,
    exact_degree: int = 0,
    law: DegreeLaw = PUBLISHED,
    projection: MonomialLaw | None = None,
    head_dim: int = 4,
    seed: int = 0,
    centred: bool = False,
) -> Maclaurin:
    return Maclaurin(
        HeadShape(num_heads=2, head_dim=head_dim, max_len=64),
        torch.Generator().manual_seed(seed),
        kernel=kernel or Exp(),
        num_features=num_features,
        exact_degree=exact_degree,
        degree_law=law,
        projection=projection or Rademacher(),
        centred=centred,
    ).double()


def phi(feature_map: Maclaurin, x: Tensor) -> Tensor:
    """phi of a vector on the kernel's own scale, so that phi(x).phi(y) estimates K(x.y)."""
    return feature_map(x[None, None, None] * feature_map.head_dim**0.25, True).values[0, 0, 0]


def unit_rows(length: int, head_dim: int, seed: int) -> Tensor:
    """[1, 1, L, D] after token pre-SBN: mean 0, norm 1."""
    x = draw(1, 1, length, head_dim, seed=seed)
    x = x - x.mean(dim=-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True)


def assert_mean(samples: Tensor, expected: float) -> None:
    error = samples.std() / math.sqrt(len(samples))
    assert abs(samples.mean() - expected) < 5.2 * error, f"{samples.mean():.6g} +- {error:.2g}, expected {expected:.6g}"


GOLDEN = {  # kernel -> K(t), variance of one feature: degrees from 0, from 1 (published), from 2
    "exp": (Exp(), 1.1618342427, 1.57864782, 0.43806255, 0.02278656),
    "inverse": (Inverse(), 1.1764705882, 2.05470650, 0.68825220, 0.14979640),
    "log": (Log(), 1.1625189295, 1.59444579, 0.44653517, 0.02711724),
    "sqrt": (Sqrt(), 1.0780455543, 1.05317942, 0.10158961, 0.00153113),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_closed_forms_give_the_golden_numbers(name: str) -> None:
    kernel, value, *variances = GOLDEN[name]
    for exact_degree, variance in zip((-1, 0, 1), variances, strict=True):
        feature_map = maclaurin(6, kernel=kernel, exact_degree=exact_degree)
        assert feature_map.kernel(X, Y).item() == pytest.approx(value, abs=1e-9)
        num_random = 6 - (0, 1, 5)[exact_degree + 1]
        assert feature_map.variance(X, Y).item() * num_random == pytest.approx(variance, abs=3e-6)


@pytest.mark.parametrize("name", GOLDEN)
def test_features_are_unbiased_with_the_closed_form_variance(name: str) -> None:
    kernel, value, _, variance, _ = GOLDEN[name]
    feature_map = maclaurin(200_001, kernel=kernel)
    single = (phi(feature_map, X) * phi(feature_map, Y))[:-1] * 200_000  # one estimate per random feature
    assert_mean(single, value - 1)
    assert_mean((single - (value - 1)) ** 2, variance)
    assert_mean(single**2, feature_map.second_moment(X, Y).item())


@pytest.mark.parametrize("projection", [Rademacher(), SRHT(zero_pad=True), Haar(), ComplexRademacher()])
@pytest.mark.parametrize("dim", [4, 3])
def test_every_projection_has_its_stated_moments(projection: MonomialLaw, dim: int) -> None:
    x, y, size = X[:dim].float(), Y[:dim].float(), projection.block(dim)
    generator = torch.Generator().manual_seed(5)
    for degree in (1, 2, 3):
        factors = [projection.sample(40_000 * size, dim, generator) for _ in range(degree)]
        zx, zy = (math.prod(f @ a.to(f.dtype) for f in factors) for a in (x, y))
        z = (zx * zy.conj()).real.double().reshape(-1, size)
        assert_mean(z[:, 0], ((x @ y) ** degree).item())
        assert_mean(z[:, 0] ** 2, projection.moment(degree, x, y).item())
        if size > 1:
            assert_mean(z[:, 0] * z[:, 1], projection.pair_moment(degree, x, y).item())


def test_degree_two_golden_variances() -> None:
    t4 = (X @ Y) ** 4
    assert (Rademacher().moment(2, X, Y) - t4).item() == pytest.approx(0.04325839, abs=1e-8)
    assert (ComplexRademacher().moment(2, X, Y) - t4).item() == pytest.approx(0.02367904, abs=1e-8)


@pytest.mark.parametrize("projection", [Rademacher(), SRHT(zero_pad=False), Haar(), ComplexRademacher()])
def test_the_variance_of_a_whole_stratified_map_is_the_closed_form(projection: MonomialLaw) -> None:
    """Counts that fill a block, part of one, and one and a half: each pair term matters."""
    width = 2 if projection.is_complex else 1
    law = Counts({1: 3, 2: 6, 3: 5}, shrinkage=False)
    maps = [maclaurin(1 + 14 * width, law=law, projection=projection, seed=s) for s in range(3000)]
    estimates = torch.stack([phi(m, X) @ phi(m, Y) for m in maps])
    mean, variance = maps[0].kernel(X, Y), maps[0].variance(X, Y)
    torch.testing.assert_close(mean, Exp().series(X @ Y, range(4)))
    assert_mean(estimates, mean.item())
    assert_mean((estimates - mean) ** 2, variance.item())


@pytest.mark.parametrize("exact_degree", [-1, 0, 1, 2])
@pytest.mark.parametrize("projection", [Rademacher(), SRHT(zero_pad=True), ComplexRademacher()])
def test_the_fast_evaluation_is_the_definition_in_outputs_and_gradients(exact_degree: int, projection) -> None:
    head_dim = 6
    exact = (0, 1, 7, 28)[exact_degree + 1]
    x = draw(2, 2, 7, head_dim, seed=1, scale=1.0).requires_grad_()
    for num_random in (10, 40):
        feature_map = maclaurin(
            exact + num_random, exact_degree=exact_degree, projection=projection, head_dim=head_dim, seed=3
        )
        results = []
        for features in (feature_map(x, True).values, maclaurin_features_naive(feature_map, x)):
            weight = draw(*features.shape, seed=2)
            results.append((features, *torch.autograd.grad((features * weight).sum(), x)))
        for fast, slow in zip(*results, strict=True):
            torch.testing.assert_close(fast, slow, rtol=1e-6, atol=1e-12)
        assert feature_map.num_outputs == features.shape[-1]


def test_the_published_law_is_geometric_on_1_to_20() -> None:
    law = PUBLISHED.draw(Exp(), 1, 100_000, 32, torch.Generator().manual_seed(0))
    degrees = torch.repeat_interleave(torch.tensor(list(law.counts)), torch.tensor(list(law.counts.values())))
    assert_mean(degrees.double(), 1.99998)
    assert min(law.expected) == 1
    assert max(law.expected) == 20
    assert law.expected[3] == pytest.approx(100_000 * 2**-3 / (1 - 2**-20))
    assert law.weights[3] == pytest.approx(1 / 6 * 8 * (1 - 2**-20) / 100_000)


@pytest.mark.parametrize(("exact_degree", "published"), [(0, 2.2e-2), (1, 2.3e-3)])
def test_the_kernel_matrix_has_the_published_regimes_error(exact_degree: int, published: float) -> None:
    errors = []
    for seed in range(12):
        q, k = unit_rows(100, 32, 2 * seed), unit_rows(100, 32, 2 * seed + 1)
        feature_map = maclaurin(exact_degree=exact_degree, head_dim=32, seed=seed)
        estimate = feature_map(q, True).values @ feature_map(k, False).values.transpose(-2, -1)
        errors.append((estimate - (q @ k.transpose(-2, -1) / math.sqrt(32)).exp()).square().mean())
    assert torch.stack(errors).mean().sqrt().item() == pytest.approx(published, rel=0.1)


def test_the_error_falls_with_the_root_of_the_number_of_features() -> None:
    """At a fixed pair the variance is exactly proportional to 1 / (F - 1); the measured one, within 5.2 of its errors."""
    closed = [maclaurin(f).variance(X, Y).item() * (f - 1) for f in (64, 512, 4096)]
    assert closed == pytest.approx([closed[0]] * 3, rel=1e-9)
    for f, draws in ((64, 1500), (1024, 400)):
        estimates = torch.stack([phi(m, X) @ phi(m, Y) for m in (maclaurin(f, seed=s) for s in range(draws))])
        assert_mean((estimates - Exp().exact(X @ Y)) ** 2, closed[0] / (f - 1))


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_one_coefficient_gives_one_monomial(degree: int) -> None:
    kernel = Polynomial({0: 1.0, degree: 1.0})
    feature_map = maclaurin(100_001, kernel=kernel, law=Counts({degree: 100_000}, shrinkage=False))
    assert_mean((phi(feature_map, X) * phi(feature_map, Y))[:-1] * 100_000, 0.15**degree)


@pytest.mark.parametrize("exact_degree", [1, 2])
def test_a_kernel_without_higher_terms_is_exact(exact_degree: int) -> None:
    kernel = Polynomial({0: 0.7, 1: 1.3, 2: 0.9 if exact_degree == 2 else 0.0})
    feature_map = maclaurin((5, 15)[exact_degree - 1], kernel=kernel, exact_degree=exact_degree)
    assert (phi(feature_map, X) @ phi(feature_map, Y)).item() == pytest.approx(kernel.exact(X @ Y).item(), rel=1e-12)
    assert not feature_map.variance(X, Y).item()


@pytest.mark.parametrize("projection", [SRHT(zero_pad=False), Haar()])
def test_whole_blocks_of_degree_one_have_no_variance(projection: MonomialLaw) -> None:
    feature_map = maclaurin(9, law=Counts({1: 8}, shrinkage=False), projection=projection)
    assert (phi(feature_map, X) @ phi(feature_map, Y)).item() == pytest.approx(1.15, rel=1e-6)
    assert abs(feature_map.variance(X, Y).item()) < 1e-15


def test_centring_estimates_the_same_attention_weights() -> None:
    """With every term of the series that matters made exact, expanding elsewhere changes nothing but a row factor."""
    q, k = (0.2 * unit_rows(9, 4, s) + 0.3 for s in (1, 2))
    for kernel in (Exp(), Inverse(), Log(), Sqrt()):
        feature_map = maclaurin(15, kernel=kernel, exact_degree=2, centred=True)
        prepared = feature_map.prepare(q, k, None)
        weights = feature_map(q, True, prepared).values @ feature_map(k, False, prepared).values.transpose(-2, -1)
        expected = kernel.exact(q @ k.transpose(-2, -1) / 2)
        weights, expected = (w / w.sum(dim=-1, keepdim=True) for w in (weights, expected))
        torch.testing.assert_close(weights, expected, rtol=2e-4, atol=0)  # what degree 3 leaves at |s| <= .04


def test_optimal_counts_have_the_least_expected_variance() -> None:
    def cost(law: Mapping[int, int]) -> float:
        return sum(
            Exp().coefficient(n) ** 2 * (1 - isotropic_moment(n, 32)) / count / 32**n for n, count in law.items()
        )

    best = Optimal(max_degree=20, temperature=1.0, shrinkage=False)
    counts = best.draw(Exp(), 1, 127, 32, torch.Generator()).counts
    assert sum(counts.values()) == 127
    kept = {n: counts[n] for n in (1, 2)}
    for shift in (-3, 3):
        assert cost({1: kept[1] + shift, 2: kept[2] - shift}) > cost(kept)


def test_shrunk_counts_beat_every_neighbour_and_weights_shrink_towards_zero() -> None:
    law = Optimal(max_degree=6, temperature=6.0, shrinkage=True).draw(Inverse(), 2, 95, 16, torch.Generator())

    def remaining(counts: Mapping[int, int]) -> float:
        total = 0.0
        for n in range(2, 7):
            b, scale = isotropic_moment(n, 16), (6 / 4) ** (2 * n)
            total += scale * b * (1 - b) / (b * counts.get(n, 0) + 1 - b)
        return total

    for source in law.counts:
        for target in range(2, 7):
            if source != target:
                moved = dict(law.counts)
                moved[source] -= 1
                moved[target] = moved.get(target, 0) + 1
                assert remaining(moved) >= remaining(law.counts)
    for n, count in law.counts.items():
        assert 0 < law.weights[n] * count < 1


def test_stratified_and_kernel_laws_spread_every_feature() -> None:
    for law in (
        Geometric(base=2.0, max_degree=20, sampling="stratified"),
        KernelLaw(max_degree=20, sampling="iid"),
        KernelLaw(max_degree=20, sampling="stratified"),
    ):
        drawn = law.draw(Log(), 1, 127, 32, torch.Generator().manual_seed(0))
        assert sum(drawn.counts.values()) == 127
        assert sum(drawn.expected.values()) == pytest.approx(127)
        for n, mean in drawn.expected.items():
            assert mean * drawn.weights[n] == pytest.approx(1 / n)


def test_another_draw_of_degrees_can_be_loaded() -> None:
    first, second = maclaurin(seed=0), maclaurin(seed=1)
    assert first.signs.shape != second.signs.shape
    second.load_state_dict(first.state_dict())
    x = draw(1, 2, 7, 4, seed=1)
    assert torch.equal(first(x, True).values, second(x, True).values)
    torch.testing.assert_close(second(x, True).values, maclaurin_features_naive(second, x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_features": 4, "exact_degree": 1}, "exact_degree=1 with head_dim=4 needs at least 5"),
        ({"num_features": 14, "exact_degree": 2}, "needs at least 15"),
        ({"num_features": 1}, "needs at least 2"),
        ({"exact_degree": 3}, r"choose -1 \(none\), 0, 1 or 2"),
        ({"projection": SRHT(zero_pad=False), "head_dim": 6}, "power of two, got 6.*zero_pad=true"),
        ({"projection": ComplexRademacher()}, "use 127 or 129"),
        ({"law": Counts({1: 5}, shrinkage=False)}, "exactly 127 features"),
        ({"law": Geometric(base=1.0, max_degree=20, sampling="iid")}, "base=1.0 must exceed 1"),
        ({"law": Geometric(base=2.0, max_degree=20, sampling="sobol")}, "choose iid or stratified"),
        ({"law": Geometric(base=2.0, max_degree=0, sampling="iid")}, "no term of degree 1 to 0"),
        (
            {"kernel": Polynomial({0: 1.0}), "law": KernelLaw(max_degree=20, sampling="iid")},
            "no term of degree 1 to 20",
        ),
        ({"exact_degree": -1, "centred": True}, "set exact_degree to 0, 1 or 2"),
    ],
)
def test_impossible_settings_are_refused_with_advice(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maclaurin(**settings)


@pytest.mark.parametrize("shrinkage", [False, True])
def test_optimal_counts_never_lose_the_constant(shrinkage: bool) -> None:
    """Degree 0 has no variance, and so no share of its own: one feature carries it where nothing is exact."""
    generator = torch.Generator().manual_seed(0)
    drawn = Optimal(max_degree=8, temperature=1.0, shrinkage=shrinkage).draw(Exp(), 0, 64, 16, generator)
    assert drawn.counts[0] == 1 and drawn.weights[0] == 1.0 and sum(drawn.counts.values()) == 64
    with pytest.raises(ValueError, match="at least 2"):
        Optimal(max_degree=8, temperature=1.0, shrinkage=shrinkage).draw(Exp(), 0, 1, 16, generator)
