"""Exact kernelised attention against loops over the formula, and the Gaussian's invariances."""

import math

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from attention.base import HeadShape
from attention.kernelized import GaussianAttention, KernelizedAttention, gaussian_kernel
from attention.kernels import Exp, Inverse, Log, Sqrt
from attention.normalizers import Normalizer
from attention.regularizers import FixedTemperature, NoPostSBN, NoPreSBN, TokenPreSBN
from attention.softmax import softmax_attention
from tests.attention.conftest import CONF, build, draw, draw_qkv, padding

SHAPE = HeadShape(num_heads=2, head_dim=16, max_len=64)


def kernelized(kernel, temperature: float = 1.0, *, pre=NoPreSBN) -> KernelizedAttention:
    return KernelizedAttention(
        SHAPE,
        torch.Generator(),
        kernel=kernel,
        pre=pre,
        temperature=lambda shape, generator: FixedTemperature(shape, generator, value=temperature),
        normalizer=Normalizer("sum"),
        post=NoPostSBN,
    )


def token(shape, generator) -> TokenPreSBN:
    return TokenPreSBN(shape, generator, eps=1e-6)


def test_exp_without_regularisers_is_softmax_in_outputs_and_gradients() -> None:
    mask = padding(37)
    inputs = [x.requires_grad_() for x in draw_qkv(37)]
    results = []
    for attend in (kernelized(Exp()), softmax_attention):
        out = attend(*inputs, mask)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["exp", "inverse", "log", "sqrt"])
def test_every_kernel_follows_the_formula(name: str) -> None:
    formula = {
        "exp": math.exp,
        "inverse": lambda t: 1 / (1 - t),
        "log": lambda t: 1 - math.log(1 - t),
        "sqrt": lambda t: 2 - math.sqrt(1 - t),
    }[name]
    q, k, v = draw_qkv(7)
    mask = padding(7)
    x, y = ((a - a.mean(-1, keepdim=True)) / (a - a.mean(-1, keepdim=True)).norm(dim=-1, keepdim=True) for a in (q, k))
    out = build(f"kernelized_{name}")(q, k, v, mask)
    for i in range(7):
        real = [j for j in range(7) if not mask[1, j]]
        weights = [formula((x[1, 0, i] @ y[1, 0, j]).item() / 4) for j in real]
        expected = sum(w * v[1, 0, j] for w, j in zip(weights, real, strict=True)) / sum(weights)
        torch.testing.assert_close(out[1, 0, i], expected)


def test_temperature_multiplies_the_argument() -> None:
    q, k, v = draw_qkv(9)
    torch.testing.assert_close(kernelized(Exp(), 2.5)(q, k, v), kernelized(Exp())(2.5 * q, k, v))


@pytest.mark.parametrize("kernel", [Inverse(), Log(), Sqrt()], ids=["inverse", "log", "sqrt"])
def test_arguments_outside_of_the_domain_are_refused(kernel) -> None:
    q, k, v = draw_qkv(9, scale=0.3)
    k[0, 0, 5] = 30.0
    mask = torch.zeros(2, 9, dtype=torch.bool)
    with pytest.raises(ValueError, match="Lower the temperature"):
        kernelized(kernel)(q, k, v, mask)
    mask[0, 5] = True  # a padded key is no reason to refuse
    assert kernelized(kernel)(q, k, v, mask).isfinite().all()
    with pytest.raises(ValueError, match=r"may reach \|t\| = 1\.25"):
        kernelized(kernel, 5.0, pre=token)
    kernelized(kernel, 3.9, pre=token)


def test_a_gaussian_is_translation_invariant_and_not_normalised() -> None:
    attend = GaussianAttention(SHAPE, torch.Generator())
    q, k, v = draw_qkv(37)
    mask, shift = padding(37), draw(16, seed=8)
    torch.testing.assert_close(attend(q + shift, k + shift, v, mask), attend(q, k, v, mask))
    same = q[:, :, :1].expand_as(k)
    torch.testing.assert_close(attend(q[:, :, :1], same, v), v.sum(dim=2, keepdim=True))


def test_a_gaussian_is_softmax_numerators_with_norms_taken_out() -> None:
    x, y = draw(5, 8, seed=1), draw(6, 8, seed=2)
    slow = torch.stack([torch.stack([(-(a - b).square().sum() / 2).exp() for b in y]) for a in x])
    torch.testing.assert_close(gaussian_kernel(x, y), slow)
    assert gaussian_kernel(100 * x, 100 * x).max() <= 1


@pytest.mark.parametrize("name", ["exp", "inverse", "log", "trigh", "sqrt"])
def test_schoenbat_and_its_exact_twin_are_configured_alike(name: str) -> None:
    exact, estimate = (OmegaConf.load(CONF / f"{kind}_{name}.yaml") for kind in ("kernelized", "schoenbat"))
    for node in ("pre", "temperature", "normalizer", "post"):
        assert exact[node] == estimate[node]
    assert exact.kernel == estimate.feature_map.kernel
    assert type(hydra.utils.instantiate(exact.kernel)).__name__.lower() == name
