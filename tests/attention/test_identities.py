"""Mechanisms that are equal by their mathematics are equal as configured: each pair is built from its YAML
files, with overrides as a user types them.

The limits F -> infinity of the exp kernel and of the exponential family, and trigh = exp, are tested beside their
mechanisms (test_schoenbat.py, test_exponential_attention.py); here are the other kernels and the exact identities.
"""

from functools import cache

import hydra
import pytest
import torch
from torch import Tensor

from attention.base import Attention, AttentionFactory, HeadShape, mean_over_keys
from tests.attention.conftest import CONF, deviation, draw_qkv, padding

DIM = 8


@cache
def factory(name: str, *overrides: str) -> AttentionFactory:
    """`overrides` as typed, with the node `attention` left out."""
    typed = [item if "@attention" in item else f"attention.{item}" for item in overrides]
    with hydra.initialize_config_dir(str(CONF.parent), version_base="1.3"):
        return hydra.utils.instantiate(hydra.compose(f"attention/{name}", overrides=typed).attention)


def mechanism(name: str, *overrides: str, seed: int = 0) -> Attention:
    return factory(name, *overrides)(HeadShape(2, DIM, 64), torch.Generator().manual_seed(seed)).double().eval()


def inputs(length: int = 37, scale: float = 0.5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *draw_qkv(length, head_dim=DIM, scale=scale), padding(length)


def test_taylor_is_rmfa_with_two_exact_degrees_and_nothing_random() -> None:
    width = 1 + DIM + DIM * (DIM + 1) // 2
    exact = mechanism("rmfa", "feature_map.exact_degree=2", f"feature_map.num_features={width}")
    for scale in (0.5, 3.0):
        data = inputs(scale=scale)
        assert deviation(exact(*data), mechanism("taylor")(*data)) < 1e-10


def test_polysketch_of_degree_two_is_polynomial_attention_of_degree_two() -> None:
    sketch = mechanism("polysketch", "feature_map.degree=2", "feature_map.sketch_dim=null")
    assert deviation(sketch(*inputs()), mechanism("polynomial", "degree=2")(*inputs())) < 1e-10


def test_rfa_is_trigrf_on_unit_inputs() -> None:
    """Whatever the common factor e: both sums of weights are divided by themselves, with the same guard per key."""
    alike = (
        "projection@attention.feature_map.projection=gaussian", "normalizer.policy=signed_clamp",
        "normalizer.constant=1e-9", "feature_map.num_features=4096",
    )  # fmt: skip
    rfa, trigrf = mechanism("rfa", *alike, "feature_map.norm_epsilon=0"), mechanism("trigrf", *alike)
    q, k, v, mask = inputs()
    unit_q, unit_k = (DIM**0.25 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    assert deviation(rfa(q, k, v, mask), trigrf(unit_q, unit_k, v, mask)) < 1e-8


@pytest.mark.parametrize("name", ["favor_sharp", "aderf", "diag_derf"])
def test_the_fitted_family_is_favor_plus_plus_on_isotropic_data(name: str) -> None:
    """Tokens at +-c e_i: second moments are multiples of I and means are 0, so nothing is left to fit but a scalar."""
    frame = 1.3 * torch.cat([torch.eye(DIM), -torch.eye(DIM)]).double()
    order = torch.randperm(2 * DIM, generator=torch.Generator().manual_seed(0))
    q, k = (x.expand(2, 2, -1, -1) for x in (frame, frame[order]))
    v = draw_qkv(2 * DIM, head_dim=DIM)[2]
    plain = mechanism("favor_plus_plus")(q, k, v)
    assert deviation(mechanism(name)(q, k, v), plain) < 1e-6
    assert deviation(mechanism("performer")(q, k, v), plain) > 1e-3  # the scalar is not 0
    skewed = k * torch.linspace(0.5, 2, DIM, dtype=k.dtype)
    assert deviation(mechanism(name)(q, skewed, v), mechanism("favor_plus_plus")(q, skewed, v)) > 1e-3


@pytest.mark.parametrize("name", ["inverse", "log", "sqrt"])
def test_schoenbat_converges_to_its_exact_kernel(name: str) -> None:
    """16 times the random features, 1/16 of the mean squared error: within a factor of 2 over 16 draws each."""
    q, k, v, mask = inputs()
    exact = mechanism(f"kernelized_{name}")(q, k, v, mask)
    errors = []
    for width in (65, 1025):
        draws = [mechanism(f"schoenbat_{name}", f"feature_map.num_features={width}", seed=s) for s in range(16)]
        errors.append(torch.stack([(module(q, k, v, mask) - exact).square().mean() for module in draws]).mean())
    assert 8 < errors[0] / errors[1] < 32
    assert errors[1] < 0.3 * (exact - mean_over_keys(v, mask)).square().mean()
