"""Exact kernelised attention in blocks is its definition with all weights written out; in-place kernels are the kernels."""

import pytest
import torch
from torch import Tensor

import attention.fused.kernelized as fused
from attention.kernels import Exp, Inverse, Kernel, Log, Sqrt, Trigh
from tests.attention.conftest import draw, draw_qkv, padding

KERNELS = [Exp(), Inverse(), Log(), Sqrt(), Trigh()]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: type(kernel).__name__)
def test_a_kernel_in_place_is_the_kernel(kernel: Kernel) -> None:
    t = draw(50, seed=1, scale=0.2)
    copy = t.clone()
    assert kernel.exact_(copy) is copy
    torch.testing.assert_close(copy, kernel.exact(t))


@pytest.mark.parametrize("masked", [False, True], ids=["all real", "padded"])
@pytest.mark.parametrize("size", [2**6, 2**11, 2**19], ids=["tiny", "some", "one"])
@pytest.mark.parametrize("kernel", [Exp(), Log(), Sqrt()], ids=lambda kernel: type(kernel).__name__)
def test_blocks_give_the_sums_and_gradients_of_the_definition(
    kernel: Kernel, size: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "_CPU_BYTES", size)
    mask = padding(37) if masked else None
    (q, _, _), (_, k, v) = draw_qkv(23, seed=3), draw_qkv(37)  # another number of queries than keys
    results = []
    for compute in (lambda *x: fused.kernelized_sums(kernel, *x, mask, True), lambda *x: fused.kernelized_sums_naive(kernel, *x, mask)):  # fmt: skip
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        sums, totals = compute(*inputs)
        loss = (sums * draw(*sums.shape, seed=6)).sum() + (totals * draw(*totals.shape, seed=7)).sum()
        results.append([sums, totals, *torch.autograd.grad(loss, inputs)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_an_argument_outside_of_the_domain_is_found_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_CPU_BYTES", 2**9)

    def check(x: Tensor, y: Tensor) -> None:
        fused.kernelized_sums(Inverse(), x, y, y, None, True)

    x, y = draw(1, 1, 40, 4, seed=1, scale=0.1), draw(1, 1, 40, 4, seed=2, scale=0.1)
    check(x, y)
    x[0, 0, 39], y[0, 0, 39] = 3.0, 3.0
    with pytest.raises(ValueError, match="Lower the temperature"):
        check(x, y)
