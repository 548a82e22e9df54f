"""The projection zoo: exact identities of each law, the mean of exp(w.u) that its kernel rests on, and who may use whom.

False alarms: statistical comparisons allow 6 standard errors (2e-9 each for a normal mean); seeds are fixed anyway.
"""

import math
from functools import cache

import hydra
import pytest
import torch

from attention.base import Attention, AttentionFactory, HeadShape
from attention.feature_maps.base import FeatureMap, Features
from attention.projections.base import Projection
from attention.projections.gaussian import Gaussian, Orthogonal
from attention.projections.moments import characteristic, hypergeometric_0f1, moment_generating, moment_on_sphere
from attention.projections.quadrature import GaussHermiteSampled, MomentMatched, Qmc, SparseGrid, gauss_hermite
from attention.projections.structured import (
    Fastfood,
    FastfoodLearnable,
    HybridRandomOrthogonalMatrix,
    RandomOrthogonalMatrix,
    SignedCirculant,
    Sorf,
)
from tests.attention.conftest import CONF, draw, draw_qkv, padding

LAWS: dict[str, Projection] = {
    "gaussian": Gaussian(),
    "orf": Orthogonal(),
    "orf_fixed": Orthogonal(norms="fixed"),
    "sorf": Sorf(chi_norms=False),
    "sorf_chi": Sorf(chi_norms=True),
    "rom1": RandomOrthogonalMatrix(num_blocks=1),
    "rom3": RandomOrthogonalMatrix(num_blocks=3),
    "rom_hybrid": HybridRandomOrthogonalMatrix(num_blocks=3),
    "scrf": SignedCirculant(),
    "fastfood": Fastfood(),
    "fastfood_learnable": FastfoodLearnable(),
    "qmc": Qmc(),
    "mm": MomentMatched(),
    "sgq": GaussHermiteSampled(num_nodes=8),
}
ONE_NORM = ("orf_fixed", "sorf", "rom1", "rom3")
# the laws whose blocks of D rows are independent, so that one long sample is many draws
BLOCKWISE = [name for name in LAWS if name not in ("qmc", "mm", "fastfood_learnable", "rom_hybrid")]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def direction(dim: int, norm: float, seed: int = 5) -> torch.Tensor:
    u = torch.randn(dim, generator=rng(seed), dtype=torch.float64)
    return norm * u / u.norm()


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize(("num_features", "dim"), [(37, 16), (37, 10), (64, 8), (17, 12)])
def test_every_law_gives_the_shape_asked_for_and_depends_on_the_generator_alone(name, num_features, dim) -> None:
    law = LAWS[name]
    torch.manual_seed(1)
    first = law.sample(num_features, dim, rng(3))
    torch.manual_seed(2)
    again = law.sample(num_features, dim, rng(3))
    built = law.build(num_features, dim, rng(3))
    assert first.shape == (num_features, dim)
    assert first.dtype == torch.float32
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(first, built().detach(), rtol=0, atol=0)
    assert not torch.equal(first, law.sample(num_features, dim, rng(4)))


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("dim", [16, 10])
def test_the_mean_of_ww_is_the_identity(name: str, dim: int) -> None:
    num_rows = 48
    draws = torch.stack([LAWS[name].sample(num_rows, dim, rng(seed)) for seed in range(300)]).double()
    estimates = draws.transpose(1, 2) @ draws / num_rows
    error = (estimates.mean(dim=0) - torch.eye(dim)).abs()
    standard_error = estimates.std(dim=0) / math.sqrt(len(draws))
    assert bool((error <= 6 * standard_error + 1e-6).all())


def test_orthogonal_blocks_are_orthogonal_with_the_norms_they_claim() -> None:
    w = Orthogonal().sample(40, 16, rng(0)).double()
    gram = w[16:32] @ w[16:32].T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-5, rtol=0)
    assert gram.diagonal().std() > 0.5
    fixed = Orthogonal(norms="fixed").sample(40, 16, rng(0)).double()
    torch.testing.assert_close(fixed[:16] @ fixed[:16].T, 16 * torch.eye(16, dtype=torch.float64), atol=1e-5, rtol=0)


def test_orthogonal_directions_are_haar_distributed_in_sign() -> None:
    """QR without the sign fix gives R a positive diagonal and Q a biased one."""
    blocks = Orthogonal(norms="fixed").sample(3 * 4000, 3, rng(0)).view(4000, 3, 3) / math.sqrt(3)
    trace = blocks.diagonal(dim1=1, dim2=2).sum(dim=-1)
    assert abs(float(trace.mean())) < 6 / math.sqrt(4000)  # a Haar trace has mean 0 and variance 1


@pytest.mark.parametrize("name", ["sorf", "rom1", "rom3"])
def test_sign_products_have_orthogonal_rows_of_norm_root_d_exactly(name: str) -> None:
    w = LAWS[name].sample(40, 16, rng(0)).double()
    torch.testing.assert_close(w[:16] @ w[:16].T, 16 * torch.eye(16, dtype=torch.float64), atol=1e-5, rtol=0)
    torch.testing.assert_close(w.norm(dim=1), torch.full((40,), 4.0, dtype=torch.float64), atol=1e-6, rtol=0)


def test_rom_with_three_blocks_is_the_law_of_sorf() -> None:
    sorf, rom = Sorf(chi_norms=False), RandomOrthogonalMatrix(num_blocks=3)
    torch.testing.assert_close(sorf.sample(20, 8, rng(1)), rom.sample(20, 8, rng(1)))


def test_signed_circulant_rows_share_one_norm_per_block_and_are_shifts_up_to_signs() -> None:
    w = SignedCirculant().sample(20, 10, rng(0))
    torch.testing.assert_close(w.norm(dim=1)[:10], w[0].norm().expand(10))
    torch.testing.assert_close(w[3].abs(), w[0].abs().roll(3))


def test_fastfood_row_norms_are_independent_chi_norms() -> None:
    """Row norms are c_i exactly: their squares have the mean and variance of chi^2(D)."""
    squares = Fastfood().sample(16 * 2000, 16, rng(0)).double().square().sum(dim=1)
    assert abs(float(squares.mean()) - 16) < 6 * math.sqrt(32 / len(squares))
    fourth = math.sqrt((32**2 * 2 + 48 * 16) / len(squares))  # standard error of the variance of chi^2(16)
    assert abs(float(squares.var()) - 32) < 6 * fourth


def test_learnable_fastfood_starts_at_the_fixed_one_and_learns_every_factor() -> None:
    module = FastfoodLearnable().build(20, 10, rng(7))
    torch.testing.assert_close(module().detach(), Fastfood().sample(20, 10, rng(7)), rtol=0, atol=0)
    module().square().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad.abs().sum() > 0} == {"signs", "gaussian", "scaling"}


def test_matched_moments_are_exact() -> None:
    w = MomentMatched().sample(50, 16, rng(0)).double()
    torch.testing.assert_close(w.mean(dim=0), torch.zeros(16, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(w.T @ w / 50, torch.eye(16, dtype=torch.float64), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="num_features > 16"):
        MomentMatched().sample(16, 16, rng(0))


def test_sobol_points_index_features_and_fill_every_coordinate_evenly() -> None:
    uniform = torch.special.ndtr(Qmc().sample(64, 5, rng(0)).double())
    for c in range(5):  # a net in base 2: each interval [i/64, (i+1)/64) holds exactly one point
        assert sorted((uniform[:, c] * 64).floor().int().tolist()) == list(range(64))


@pytest.mark.parametrize("num_nodes", [2, 5, 8])
def test_gauss_hermite_is_exact_up_to_its_degree(num_nodes: int) -> None:
    nodes, weights = gauss_hermite(num_nodes)
    for degree in range(2 * num_nodes):
        moment = 0.0 if degree % 2 else math.prod(range(degree - 1, 0, -2))
        assert float(weights @ nodes**degree) == pytest.approx(moment, rel=1e-9, abs=1e-9 * 4.0**degree)
    too_high = 2 * num_nodes
    assert float(weights @ nodes**too_high) != pytest.approx(math.prod(range(too_high - 1, 0, -2)), rel=1e-3)


def test_the_sparse_grid_integrates_degree_three_exactly_and_no_more() -> None:
    rule = SparseGrid().build(2 * 6 + 1, 6, rng(0))
    w, weights = rule().double(), rule.weights.double()
    u = direction(6, 1.0)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    for degree, moment in ((1, 0.0), (2, 1.0), (3, 0.0)):
        assert float(weights @ (w @ u) ** degree) == pytest.approx(moment, abs=1e-5)
    assert abs(float(weights @ (w @ u) ** 4) - 3) > 0.1
    assert float(weights @ (w @ u).exp()) == pytest.approx(float(moment_generating(SparseGrid(), u)), rel=1e-5)
    assert float(weights @ (w @ u).cos()) == pytest.approx(float(characteristic(SparseGrid(), u)), rel=1e-5)
    with pytest.raises(ValueError, match="num_features=13"):
        SparseGrid().build(12, 6, rng(0))


def test_the_sphere_s_mean_has_the_published_value_and_its_series_the_known_sums() -> None:
    assert float(moment_on_sphere(direction(16, 1.2), 16)) == pytest.approx(2.0010, abs=5e-5)
    z = torch.tensor([0.3, 2.0, 9.0], dtype=torch.float64)
    torch.testing.assert_close(hypergeometric_0f1(1.0, z), torch.special.i0(2 * z.sqrt()))  # its definition
    torch.testing.assert_close(hypergeometric_0f1(0.5, -z), torch.cos(2 * z.sqrt()))


@pytest.mark.parametrize("name", [*BLOCKWISE, "qmc"])
@pytest.mark.parametrize("dim", [16, 10])
def test_the_mean_of_exp_and_cos_of_a_row_is_what_the_law_says(name: str, dim: int) -> None:
    law, u = LAWS[name], direction(dim, 1.2)
    if name == "qmc":
        w = torch.stack([law.sample(16, dim, rng(seed)) for seed in range(500)])
    else:
        w = law.sample(16 * 4000, dim, rng(0)).unflatten(0, (-1, 16))
    products = w.double() @ u
    # 1 % for laws that are spherical or Gaussian only nearly (SORF, ROM)
    slack = 0.01 if name in ("sorf", "sorf_chi", "rom3") else 0.0
    for values, expected in ((products.exp(), moment_generating(law, u)), (products.cos(), characteristic(law, u))):
        block_means = values.mean(dim=1)
        standard_error = float(block_means.std()) / math.sqrt(len(block_means))
        assert abs(float(block_means.mean() - expected)) < 6 * standard_error + slack * float(expected)


def test_fixed_norms_bias_the_mean_as_measured() -> None:
    """2.0010 against 2.0544: a test with 40 000 blocks tells them apart."""
    u = direction(16, 1.2)
    values = (Orthogonal(norms="fixed").sample(16 * 40000, 16, rng(1)).double() @ u).exp().view(-1, 16).mean(dim=1)
    assert abs(float(values.mean()) - 2.0010) < 6 * float(values.std()) / 200
    assert float(values.mean()) < math.exp(0.72) - 6 * float(values.std()) / 200


# Standard deviation of the mean of exp(w.u) over one block of 16 rows at |u| = 1.2, with room of 15 %.
@pytest.mark.parametrize(
    ("name", "expected"),
    [("gaussian", 0.92), ("orf", 0.83), ("sorf", 0.62), ("scrf", 1.00), ("fastfood", 0.98), ("orf_fixed", 0.61)],
)
def test_the_spread_of_one_block_is_the_measured_one(name: str, expected: float) -> None:
    values = (LAWS[name].sample(16 * 5000, 16, rng(2)).double() @ direction(16, 1.2)).exp().view(-1, 16).mean(dim=1)
    assert float(values.std()) == pytest.approx(expected, rel=0.15)


def test_quadratures_spread_less_than_independent_rows() -> None:
    u = direction(16, 1.2)
    spread = {}
    for name in ("gaussian", "qmc", "mm"):
        generator = rng(0)
        means = [(LAWS[name].sample(64, 16, generator).double() @ u).exp().mean() for _ in range(1000)]
        spread[name] = float(torch.stack(means).std())
    assert spread["mm"] == pytest.approx(0.20, rel=0.2)
    assert spread["qmc"] == pytest.approx(0.31, rel=0.2)
    assert spread["gaussian"] == pytest.approx(0.46, rel=0.2)


# beyond the files of conf/projection: a choice and what is changed in it
VARIANTS = {
    "orf_fixed": ("orf", "attention.feature_map.projection.norms=fixed"),
    "sorf_chi": ("sorf", "attention.feature_map.projection.chi_norms=true"),
    "rom_hybrid": (
        "rom",
        "attention.feature_map.projection._target_=attention.projections.structured.HybridRandomOrthogonalMatrix",
    ),
    "sparse_grid": (
        "sgq",
        "attention.feature_map.projection._target_=attention.projections.quadrature.SparseGrid",
        "~attention.feature_map.projection.num_nodes",
    ),
}


@cache
def factory(name: str, projection: str, *overrides: str) -> AttentionFactory:
    """conf/attention/<name>.yaml with a file of conf/projection in its slot, as a user types it."""
    choice, *changes = VARIANTS.get(projection, (projection,))
    typed = [f"projection@attention.feature_map.projection={choice}", *changes, *overrides]
    with hydra.initialize_config_dir(str(CONF.parent), version_base="1.3"):
        return hydra.utils.instantiate(hydra.compose(f"attention/{name}", overrides=typed).attention)


def with_projection(name: str, projection: str, *overrides: str, head_dim: int = 10, seed: int = 0) -> Attention:
    return factory(name, projection, *overrides)(HeadShape(2, head_dim, 64), rng(seed)).double().eval()


ALLOW = "+attention.feature_map.allow_biased=true"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["performer", "trigrf"])
def test_a_variant_of_a_projection_is_refused_with_advice_and_runs_once_it_is_taken(name: str, variant: str) -> None:
    size = f"attention.feature_map.num_features={21 if variant == 'sparse_grid' else 24}"
    with pytest.raises(ValueError, match="allow_biased=true"):
        with_projection(name, variant, size)
    if variant == "sparse_grid" and name == "performer":
        with pytest.raises(ValueError, match="signed_clamp"):  # its negative weight makes positive features signed
            with_projection(name, variant, size, ALLOW)
        return
    q, k, v = draw_qkv(13, head_dim=10)
    out = with_projection(name, variant, size, ALLOW)(q, k, v, padding(13))
    assert out.shape == v.shape
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("node", ["orf_fixed", "sorf", "rom"])
@pytest.mark.parametrize("name", ["favor_plus_plus", "favor_sharp", "aderf"])
def test_rows_of_one_norm_are_refused_where_a_needs_their_norms(name: str, node: str) -> None:
    with pytest.raises(ValueError, match="rows of one norm"):
        with_projection(name, node, ALLOW)


@pytest.mark.parametrize("name", ["performer", "trigrf", "favor_sharp"])
def test_per_head_gives_each_head_its_own_draw_and_the_default_one_for_all(name: str) -> None:
    q, k, v = (x[:, :1].expand(-1, 2, -1, -1) for x in draw_qkv(13, head_dim=10))
    for per_head in (False, True):
        out = with_projection(name, "orf", f"++attention.feature_map.per_head={per_head}")(q, k, v, padding(13))
        assert torch.allclose(out[:, 0], out[:, 1]) != per_head


def test_a_learned_projection_gets_gradients_through_the_map() -> None:
    q, k, v = draw_qkv(13, head_dim=10)
    for name in ("performer", "trigrf", "favor_plus_plus", "relu_linear"):
        module = with_projection(name, "fastfood_learnable", ALLOW)
        module(q, k, v).square().sum().backward()
        assert all(bool(p.grad.abs().sum() > 0) for p in module.parameters())


MAPS = ("performer", "favor_sharp", "trigrf", "rfa", "schoenbat_exp", "relu_linear")
PROJECTIONS = sorted(path.stem for path in (CONF.parent / "projection").glob("*.yaml"))
UNBIASED = {"gaussian", "orf", "scrf", "fastfood_fixed", "qmc"}  # every row is N(0, I)
NO_FACTORS = {"mm", "fastfood_learnable"}  # of random monomials


def is_refused(name: str, projection: str) -> bool:
    return projection in NO_FACTORS if name == "schoenbat_exp" else projection not in UNBIASED


def test_the_projections_are_those_of_the_papers() -> None:
    assert set(PROJECTIONS) == UNBIASED | NO_FACTORS | {"sorf", "rom", "sgq", "rademacher", "srht", "haar"}


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", MAPS)
def test_every_map_takes_every_projection_or_says_what_to_change(name: str, projection: str) -> None:
    inputs, mask = draw_qkv(13, head_dim=10), padding(13)
    if not is_refused(name, projection):
        out = with_projection(name, projection)(*inputs, mask)
        assert bool(out.isfinite().all())
        other = "gaussian" if projection != "gaussian" else "orf"
        assert not torch.allclose(with_projection(name, other)(*inputs, mask), out)  # it is no setting without effect
        return
    with pytest.raises(ValueError, match=r"projection@attention\.feature_map\.projection=") as refusal:
        with_projection(name, projection)
    if "allow_biased" in str(refusal.value):
        assert bool(with_projection(name, projection, ALLOW)(*inputs, mask).isfinite().all())


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("name", MAPS)
def test_what_is_not_refused_is_not_biased(name: str, projection: str) -> None:
    """Means over 100 draws within 6 standard errors: a sound combination fails below 1e-6 with fresh seeds."""
    if is_refused(name, projection):
        return
    q, k = (draw(1, 2, 4, 8, seed=seed, scale=0.4) for seed in (1, 2))
    size = 16 if name == "schoenbat_exp" else 64
    estimates = []
    for seed in range(100):
        module = with_projection(name, projection, f"attention.feature_map.num_features={size}", head_dim=8, seed=seed)
        features = next(part for part in module.modules() if isinstance(part, FeatureMap))
        x, y = features.scaled(q), features.scaled(k)
        prepared = features.prepare(q, k, None)
        phi = [plain(features(part, side, prepared)) for part, side in ((q, True), (k, False))]
        estimates.append((phi[0] * phi[1]).sum(dim=-1).detach())
    samples, expected = torch.stack(estimates), features.kernel(x, y).detach()
    error = samples.std(dim=0) / len(samples) ** 0.5
    assert ((samples.mean(dim=0) - expected).abs() / error).max() < 6


def plain(features: Features) -> torch.Tensor:
    """phi without the stabiliser, which only a ratio ignores."""
    logits = 0.0 if features.logits is None else features.logits
    values = 1.0 if features.values is None else features.values
    return values * torch.as_tensor(logits).exp()
