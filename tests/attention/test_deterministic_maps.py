"""The feature maps of linear attention that have a closed form, against the weights they stand for."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from attention.base import HeadShape
from attention.feature_maps.base import FeatureMap
from attention.feature_maps.deterministic import CosineRelu, EluPlusOne, Hedgehog, Rebased, Taylor
from attention.feature_maps.random_relu import RandomRelu
from attention.feature_maps.symmetric_square import num_pairs, symmetric_square
from attention.linear import LinearAttention
from attention.normalizers import Normalizer
from attention.projections.gaussian import Gaussian
from tests.attention.conftest import deviation, draw, draw_qkv, padding

LENGTH, SHAPE = 37, HeadShape(num_heads=2, head_dim=6, max_len=64)


def mixer(feature_map: FeatureMap, policy: str = "sum") -> LinearAttention:
    module = LinearAttention(
        SHAPE, torch.Generator(), feature_map=lambda shape, generator: feature_map, normalizer=Normalizer(policy)
    )
    return module.double()


def inputs(scale: float = 0.5) -> list[Tensor]:
    return [x.requires_grad_() for x in draw_qkv(LENGTH, head_dim=6, scale=scale)]


def assert_same_function(module: LinearAttention, weights_of) -> None:
    """Outputs and gradients of `module` against sum_j w_ij v_j / sum_j w_ij with w = weights_of(q, k), masked."""
    q, k, v = inputs()
    mask = padding(LENGTH)
    weights = weights_of(q, k) * ~mask[:, None, None, :]
    total = weights.sum(dim=-1, keepdim=True)
    slow = weights / torch.where(total > 0, total, 1.0) @ v  # a cosFormer query may have no weight at all
    fast = module(q, k, v, mask)
    assert deviation(fast, slow) < 1e-10
    probe = draw(*fast.shape, seed=7)
    for actual, expected in zip(
        torch.autograd.grad((fast * probe).sum(), (q, k, v)),
        torch.autograd.grad((slow * probe).sum(), (q, k, v)),
        strict=True,
    ):
        assert deviation(actual, expected) < 1e-9


def dot(x: Tensor, y: Tensor) -> Tensor:
    return x @ y.transpose(-2, -1)


@pytest.mark.parametrize("dim", [1, 2, 5, 6, 16, 33])
def test_the_symmetric_square_is_the_squared_dot_product_without_waste(dim: int) -> None:
    x, y = draw(3, 4, dim, seed=1), draw(3, 4, dim, seed=2)
    assert symmetric_square(x).shape == (3, 4, dim * (dim + 1) // 2)
    product = (symmetric_square(x, 0.7) * symmetric_square(y, 0.7)).sum(dim=-1)
    assert deviation(product, 0.49 * (x * y).sum(dim=-1) ** 2) < 1e-12


def test_the_linear_transformer_uses_unscaled_elu_plus_one() -> None:
    assert_same_function(
        mixer(EluPlusOne(SHAPE, torch.Generator())), lambda q, k: dot(functional.elu(q) + 1, functional.elu(k) + 1)
    )


def test_elu_plus_one_stays_positive_where_the_sum_would_round_to_zero() -> None:
    phi = EluPlusOne(SHAPE, torch.Generator())(torch.full((1, 1, 1, 6), -30.0), True).values
    assert (phi > 0).all()
    assert not (functional.elu(torch.tensor(-30.0)) + 1 > 0)


def test_cosformer_weights_are_rectified_products_times_the_cosine_of_the_distance() -> None:
    position = torch.arange(LENGTH, dtype=torch.float64)
    cosine = torch.cos(math.pi * (position[:, None] - position) / (2 * SHAPE.max_len))
    assert_same_function(mixer(CosineRelu(SHAPE, torch.Generator())), lambda q, k: dot(q.relu(), k.relu()) * cosine)


def test_cosformer_depends_on_distances_alone() -> None:
    module, (q, k, v) = mixer(CosineRelu(SHAPE, torch.Generator())), draw_qkv(LENGTH, head_dim=6)
    shifted = [functional.pad(x, (0, 0, 20, 0), value=1.0) for x in (q, k, v)]
    mask = torch.zeros(2, LENGTH + 20, dtype=torch.bool)
    mask[:, :20] = True
    assert deviation(module(*shifted, mask)[:, :, 20:], module(q, k, v)) < 1e-12


def test_cosformer_without_the_cosine_is_relu_linear_attention() -> None:
    wide = CosineRelu(HeadShape(2, 6, 10**8), torch.Generator())
    q, k, v = draw_qkv(LENGTH, head_dim=6)
    weights = dot(q.relu(), k.relu())
    expected = weights / weights.sum(dim=-1, keepdim=True).clamp_min(1e-300) @ v
    assert deviation(mixer(wide)(q, k, v), expected) < 1e-10


def test_cosformer_gives_zero_to_a_query_without_a_positive_coordinate() -> None:
    q, k, v = draw_qkv(LENGTH, head_dim=6)
    q[:, :, 3] = -1.0
    out = mixer(CosineRelu(SHAPE, torch.Generator()))(q, k, v)
    assert not out[:, :, 3].any()
    assert out[:, :, 4].any()


def test_cosformer_refuses_more_positions_than_its_cosine_covers() -> None:
    with pytest.raises(ValueError, match="max_len"):
        mixer(CosineRelu(SHAPE, torch.Generator()))(*draw_qkv(65, head_dim=6))


def test_taylor_weights_are_the_second_order_exponential() -> None:
    def weights(q: Tensor, k: Tensor) -> Tensor:
        t = dot(q, k) / math.sqrt(6)
        return 1 + t + t**2 / 2

    assert_same_function(mixer(Taylor(SHAPE, torch.Generator())), weights)


def test_taylor_equals_the_expansion_over_all_ordered_pairs() -> None:
    taylor = Taylor(SHAPE, torch.Generator())
    q, k, _ = draw_qkv(LENGTH, head_dim=6, scale=2.0)

    def full(x: Tensor) -> Tensor:
        x = x * 6**-0.25
        pairs = (x.unsqueeze(-1) * x.unsqueeze(-2)).flatten(-2) * math.sqrt(0.5)
        return torch.cat([torch.ones_like(x[..., :1]), x, pairs], dim=-1)

    expected = dot(full(q), full(k))
    assert deviation(dot(taylor(q, True).values, taylor(k, False).values), expected) < 1e-12
    assert expected.min() >= 0.5
    assert Taylor(HeadShape(1, 32, 8), torch.Generator()).num_outputs == 561


def test_rebased_weights_are_squared_products_of_affine_norms() -> None:
    rebased = Rebased(SHAPE, torch.Generator())
    with torch.no_grad():
        rebased.gamma.copy_(1 + draw(*rebased.gamma.shape, seed=3))
        rebased.beta.copy_(draw(*rebased.beta.shape, seed=4))
    module = mixer(rebased)

    def weights(q: Tensor, k: Tensor) -> Tensor:
        x, y = (
            (z - z.mean(-1, keepdim=True))
            / (z.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
            * rebased.gamma[side]
            + rebased.beta[side]
            for side, z in enumerate((q, k))
        )
        return dot(x, y) ** 2 / 6

    assert_same_function(module, weights)
    phi_q, phi_k = (rebased(x, side).values for x, side in zip(inputs()[:2], (True, False), strict=True))
    assert deviation(dot(phi_q, phi_k), weights(*inputs()[:2])) < 1e-10  # the factor 1 / D too
    assert rebased.num_outputs == num_pairs(6)


@pytest.mark.parametrize("share_map", [True, False])
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_hedgehog_features_are_those_of_its_learned_maps(activation: str, share_map: bool) -> None:
    hedgehog = Hedgehog(SHAPE, torch.Generator(), activation=activation, share_map=share_map)
    with torch.no_grad():
        hedgehog.weight.add_(draw(*hedgehog.weight.shape, seed=3))
        hedgehog.bias.copy_(draw(*hedgehog.bias.shape, seed=4))
    module = mixer(hedgehog)

    def phi(x: Tensor, side: int) -> Tensor:
        side = 0 if share_map else side
        y = torch.einsum("bhld,hed->bhle", x, hedgehog.weight[side]) + hedgehog.bias[side]
        y = torch.cat([y, -y], dim=-1)
        return y.exp() if activation == "exp" else y.exp() / y.exp().sum(dim=-1, keepdim=True)

    assert_same_function(module, lambda q, k: dot(phi(q, 0), phi(k, 1)))
    assert hedgehog.weight.shape[0] == (1 if share_map else 2)


def test_hedgehog_starts_as_the_identity_and_a_sign_swaps_the_halves() -> None:
    hedgehog = Hedgehog(SHAPE, torch.Generator(), activation="softmax", share_map=False).double()
    x = draw(2, 2, 5, 6, seed=1)
    phi, mirrored = hedgehog(x, True).values, hedgehog(-x, True).values
    assert deviation(phi, torch.cat([x, -x], dim=-1).softmax(dim=-1)) < 1e-12
    assert deviation(mirrored, phi.roll(6, dims=-1)) < 1e-12
    assert deviation(phi.sum(dim=-1), torch.ones(2, 2, 5, dtype=torch.float64)) < 1e-12


def test_hedgehog_exponentials_survive_inputs_that_overflow_exp() -> None:
    module = mixer(Hedgehog(SHAPE, torch.Generator(), activation="exp", share_map=False)).float()
    q, k, v = draw_qkv(LENGTH, head_dim=6, scale=200.0, dtype=torch.float32)
    assert module(q, k, v).isfinite().all()


def test_hedgehog_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="softmax or exp"):
        Hedgehog(SHAPE, torch.Generator(), activation="relu", share_map=False)


def test_random_relu_estimates_its_closed_forms() -> None:
    """5.5 standard errors: a false alarm has probability below 1e-7 per comparison, and the seed is fixed."""
    shape, count = HeadShape(1, 4, 8), 400_000
    relu = RandomRelu(
        shape, torch.Generator().manual_seed(5), num_features=count, projection=Gaussian(), offset=0.1
    ).double()
    x, y = torch.tensor([[0.5, -0.2, 0.1, 0.4], [0.3, 0.1, -0.6, 0.2]], dtype=torch.float64)
    for a, b in ((x, y), (x, x), (x, -x), (2 * x, y)):
        phi_a, phi_b = (relu(z.view(1, 1, 1, 4) / shape.head_dim**-0.25, True).values for z in (a, b))
        single = (phi_a * phi_b).flatten() * count
        for sample, expected in ((single, relu.kernel(a, b)), (single**2, relu.second_moment(a, b))):
            assert abs(sample.mean() - expected) < 5.5 * sample.std() / math.sqrt(count)


def test_random_relu_needs_an_offset() -> None:
    with pytest.raises(ValueError, match="offset"):
        RandomRelu(SHAPE, torch.Generator(), num_features=8, projection=Gaussian(), offset=0.0)
