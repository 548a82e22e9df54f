"""ppSBN: what the input regularisers normalise, where temperatures start, and that gradients stay finite."""

import math

import pytest
import torch

from attention.base import HeadShape
from attention.regularizers import (
    BatchPreSBN,
    FixedTemperature,
    L2PreSBN,
    LearnableTemperature,
    Power,
    ScaleVec,
    TokenPreSBN,
)
from tests.attention.conftest import draw

SHAPE = HeadShape(num_heads=2, head_dim=8, max_len=64)
GENERATOR = torch.Generator().manual_seed(0)


def test_token_pre_sbn_centres_and_normalises_every_token() -> None:
    x = draw(3, 2, 7, 8, seed=1)
    out = TokenPreSBN(SHAPE, GENERATOR, eps=1e-6)(x, None)
    torch.testing.assert_close(out.norm(dim=-1), torch.ones(3, 2, 7, dtype=x.dtype))
    assert out.mean(dim=-1).abs().max() < 1e-15


def test_token_pre_sbn_is_the_released_formula() -> None:
    x = draw(3, 2, 7, 8, seed=1)
    standardised = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-12).sqrt()
    released = standardised / standardised.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(TokenPreSBN(SHAPE, GENERATOR, eps=1e-6)(x, None), released, rtol=1e-9, atol=1e-9)


def test_token_pre_sbn_ignores_scale_and_offset_of_a_token() -> None:
    x, pre = draw(1, 2, 7, 8, seed=2), TokenPreSBN(SHAPE, GENERATOR, eps=1e-6)
    torch.testing.assert_close(pre(3.7 * x - 11.0, None), pre(x, None), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("pre", [TokenPreSBN, L2PreSBN])
def test_a_constant_or_zero_token_has_finite_output_and_gradient(pre: type) -> None:
    for value in (0.0, 5.0):
        x = torch.full((1, 2, 3, 8), value, dtype=torch.float64, requires_grad=True)
        out = pre(SHAPE, GENERATOR, eps=1e-6)(x, None)
        (gradient,) = torch.autograd.grad(out.sum(), x)
        assert out.isfinite().all()
        assert gradient.isfinite().all()


def test_batch_pre_sbn_uses_real_tokens_only_and_evaluates_by_running_averages() -> None:
    pre = BatchPreSBN(SHAPE, GENERATOR, momentum=1.0, eps=1e-9).double().train()
    x, mask = draw(3, 2, 7, 8, seed=3), torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 4:] = mask[2, :2] = True
    real = x.transpose(1, 2)[~mask]  # [N, H, D]
    normalised = (x - real.mean(0)[:, None]) / real.var(0, unbiased=False)[:, None].sqrt()
    expected = normalised / normalised.norm(dim=-1, keepdim=True)
    dirty = x.masked_fill(mask[:, None, :, None], 1e3)
    out = pre(dirty, mask)
    torch.testing.assert_close(out.transpose(1, 2)[~mask], expected.transpose(1, 2)[~mask])
    # momentum 1: the running averages are the last batch's, so evaluation repeats the training output
    torch.testing.assert_close(pre.eval()(dirty, mask), out)
    alone = pre(x[1:2], mask[1:2])
    torch.testing.assert_close(alone, out[1:2])


def test_a_learnable_temperature_starts_at_one_and_stays_below_its_bound() -> None:
    temperature = LearnableTemperature(SHAPE, GENERATOR, max_argument=0.95)
    torch.testing.assert_close(temperature(), torch.ones(2, 1, 1))
    with torch.no_grad():
        temperature.theta.fill_(50.0)
    torch.testing.assert_close(temperature() / math.sqrt(8), torch.full((2, 1, 1), 0.95))


def test_impossible_temperatures_are_refused_with_advice() -> None:
    with pytest.raises(ValueError, match=r"cannot start at 1; choose more than 0\.354"):
        LearnableTemperature(SHAPE, GENERATOR, max_argument=0.3)
    with pytest.raises(ValueError, match="must be positive"):
        FixedTemperature(SHAPE, GENERATOR, value=0.0)


def test_post_sbn_is_the_identity_before_training() -> None:
    out = draw(1, 2, 7, 8, seed=4)
    assert torch.equal(ScaleVec(SHAPE, GENERATOR).double()(out), out)
    torch.testing.assert_close(Power(SHAPE, GENERATOR, eps=1e-6).double()(out), out, rtol=0, atol=1.1e-6)


def test_power_keeps_the_sign_and_has_finite_gradients_at_zero_and_below() -> None:
    post = Power(SHAPE, GENERATOR, eps=1e-6).double()
    with torch.no_grad():
        post.beta.copy_(torch.linspace(0.3, 2.0, 8))
    out = torch.linspace(-2, 2, 8 * 5, dtype=torch.float64).reshape(1, 1, 5, 8)
    out = torch.cat([out, torch.zeros(1, 1, 1, 8, dtype=torch.float64)], dim=2).requires_grad_()
    result = post(out)
    assert torch.equal(result.sign(), out.sign())
    result.square().sum().backward()
    for gradient in (out.grad, post.beta.grad, post.gamma.grad):
        assert gradient.isfinite().all()
    assert post.beta.grad.abs().min() > 0
