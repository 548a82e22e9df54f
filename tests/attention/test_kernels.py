"""Kernels: closed forms against their series, domains, and the expansion about another point."""

import math

import pytest
import torch

from attention.kernels import Exp, Inverse, Kernel, Log, Sqrt, Trigh

KERNELS = [Exp(), Inverse(), Log(), Trigh(), Sqrt()]
by_name = pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: type(k).__name__)


@by_name
def test_the_series_sums_to_the_closed_form(kernel: Kernel) -> None:
    t = torch.tensor([-0.5, 0.0, 0.3, 0.6], dtype=torch.float64)
    torch.testing.assert_close(kernel.series(t, range(151)), kernel.exact(t), rtol=0, atol=1e-9)


@by_name
def test_the_first_coefficients_are_the_published_ones(kernel: Kernel) -> None:
    published = {  # arXiv 2505.12252, released code: derivatives at 0 over n!
        "Exp": [1, 1, 1 / 2, 1 / 6, 1 / 24],
        "Trigh": [1, 1, 1 / 2, 1 / 6, 1 / 24],
        "Inverse": [1, 1, 1, 1, 1],
        "Log": [1, 1, 1 / 2, 1 / 3, 1 / 4],
        "Sqrt": [1, 1 / 2, 1 / 8, 1 / 16, 5 / 128],
    }
    assert [kernel.coefficient(n) for n in range(5)] == pytest.approx(published[type(kernel).__name__], rel=1e-15)


@by_name
def test_coefficients_are_finite_and_not_negative_at_any_degree(kernel: Kernel) -> None:
    for n in (20, 171, 1000):
        assert 0 <= kernel.coefficient(n) <= 1
    assert Sqrt().coefficient(1000) == pytest.approx(0.5 / math.sqrt(math.pi) / 1000**1.5, rel=1e-2)


def test_coefficients_are_the_derivatives_of_the_closed_form() -> None:
    for kernel in KERNELS:
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        derivative = kernel.exact(t)
        for n in range(1, 7):
            (derivative,) = torch.autograd.grad(derivative, t, create_graph=True)
            assert derivative.item() / math.factorial(n) == pytest.approx(kernel.coefficient(n), rel=1e-12)


def test_trigh_is_exp_bit_for_bit() -> None:
    t = torch.linspace(-3, 3, 1001)
    assert torch.equal(Trigh().exact(t), Exp().exact(t))
    assert all(Trigh().coefficient(n) == Exp().coefficient(n) for n in range(200))


@by_name
def test_the_expansion_about_another_point_is_the_same_kernel_up_to_a_factor(kernel: Kernel) -> None:
    for point in (-0.6, 0.0, 0.4):
        t0 = torch.tensor(point, dtype=torch.float64)
        s = torch.linspace(-0.2, 0.2, 9, dtype=torch.float64)
        u, constant = kernel.recentre(t0)
        ratio = (constant + kernel.series(s / u, range(1, 120))) / kernel.exact(t0 + s)
        torch.testing.assert_close(ratio, ratio[:1].expand(9), rtol=1e-12, atol=0)


def test_leaving_the_domain_is_refused_with_advice() -> None:
    for kernel in (Inverse(), Log(), Sqrt()):
        kernel.check_domain(torch.tensor([-0.99, 0.99]))
        with pytest.raises(ValueError, match=r"\|t\| = 1\.2.*[Ll]ower the temperature.*pre-SBN"):
            kernel.check_domain(torch.tensor([0.1, -1.2]))
    Exp().check_domain(torch.tensor([50.0]))
