"""The rules that every file of conf/attention/ obeys: U1 to U13 of the slot's contract, and what the suite adds.

`Description.complexity` is the time of one forward per head in L, D, F and own symbols, e.g. "L F D", "L w D", "L^2 D":
without "L^2" in it, the memory rule applies.
"""

import random

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention.base import count_keys
from attention.linear import LinearAttention, linear_attention, quadratic_attention
from tests.attention.conftest import (
    RULES,
    Subject,
    build,
    build_once,
    deviation,
    draw,
    draw_qkv,
    padding,
)

SHORT, LONG = 37, 600  # odd; long enough to leave the window of every sparse pattern
MAX_LEN = {1: 64, SHORT: 64, LONG: 1024}


@pytest.mark.rule("U1")
def test_padded_positions_have_no_influence(subject: Subject) -> None:
    errors = {}
    for length in (SHORT, LONG):
        module, mask = build_once(subject.name, max_len=MAX_LEN[length]), padding(length)
        clean = draw_qkv(length)
        dirty = [
            torch.where(mask[:, None, :, None], 100 * draw(*x.shape, seed=90 + i, scale=1.0), x)
            for i, x in enumerate(clean)
        ]
        real = ~mask[:, None].expand(-1, 2, -1)
        errors[f"L={length}"] = deviation(module(*dirty, mask)[real], module(*clean, mask)[real])
    subject.judge(errors, 1e-5)


@pytest.mark.rule("U2")
def test_more_padding_changes_nothing(subject: Subject) -> None:
    errors = {}
    for length, extra in ((SHORT, 20), (LONG, 131)):
        module, mask = build_once(subject.name, max_len=MAX_LEN[length]), padding(length)
        inputs, tail = draw_qkv(length), draw_qkv(extra, seed=9)
        longer = [torch.cat(pair, dim=2) for pair in zip(inputs, tail, strict=True)]
        longer_mask = torch.cat([mask, torch.ones(2, extra, dtype=torch.bool)], dim=1)
        real = ~mask[:, None].expand(-1, 2, -1)
        out = module(*longer, longer_mask)[:, :, :length]
        errors[f"L={length}+{extra}"] = deviation(out[real], module(*inputs, mask)[real])
    subject.judge(errors, 1e-5)


@pytest.mark.rule("U3")
def test_constant_values_pass_unchanged(subject: Subject) -> None:
    errors = {}
    for length in (1, SHORT, LONG):
        module, mask = build_once(subject.name, max_len=MAX_LEN[length]), padding(length)
        q, k, v = draw_qkv(length)
        cases = {"plain": (q, k)}
        if subject.reason is not None:  # inputs on which a clamp or a rectifier is active
            cases |= {"large": (6 * q, 6 * k), "negative": (-q.abs(), k)}
        for case, (a, b) in cases.items():
            out = module(a, b, torch.ones_like(v), mask).transpose(1, 2)[~mask]
            errors[f"L={length}, {case}"] = deviation(out, torch.ones_like(out))
    subject.judge(errors, 1e-4)


@pytest.mark.rule("U4")
def test_values_enter_linearly(subject: Subject) -> None:
    module, mask = build_once(subject.name), padding(SHORT)
    q, k, v = draw_qkv(SHORT)
    matrix = draw(16, 16, seed=5)
    # the shift is legal for row-stochastic mechanisms only, that is where U3 holds
    shift = draw(16, seed=6) if "U3" not in module.exemptions else torch.zeros(16, dtype=v.dtype)
    out = module(q, k, v @ matrix + shift, mask).transpose(1, 2)[~mask]
    expected = (module(q, k, v, mask) @ matrix + shift).transpose(1, 2)[~mask]
    subject.judge({"affine": deviation(out, expected)}, 1e-4)


@pytest.mark.rule("U5")
def test_positions_are_a_set(subject: Subject) -> None:
    errors = {}
    for length in (SHORT, LONG):
        module, mask = build_once(subject.name, max_len=MAX_LEN[length]), padding(length)
        q, k, v = draw_qkv(length)
        order = torch.randperm(length, generator=torch.Generator().manual_seed(3))
        q2, k2, v2 = (x[:, :, order] for x in (q, k, v))
        out = module(q, k, v)
        errors[f"keys, L={length}"] = deviation(module(q, k2, v2), out)
        errors[f"queries, L={length}"] = deviation(module(q2, k, v), out[:, :, order])
        errors[f"all, L={length}"] = deviation(
            module(q2, k2, v2, mask[:, order]).transpose(1, 2)[~mask[:, order]],
            module(q, k, v, mask)[:, :, order].transpose(1, 2)[~mask[:, order]],
        )
    subject.judge(errors, 1e-6)


@pytest.mark.rule("U6")
def test_the_first_output_sees_the_last_real_token(subject: Subject) -> None:
    errors = {}
    for case, mask in (("no mask", None), ("mask", padding(SHORT))):
        module = build_once(subject.name)
        q, k, v = draw_qkv(SHORT)
        last = SHORT - 1 if mask is None else int((~mask[0]).nonzero().max())
        changed = v.clone()
        changed[0, :, last] += 1.0
        moved = (module(q, k, changed, mask) - module(q, k, v, mask))[0, :, 0].abs().amax(dim=-1).min()
        errors[case] = float(moved < 1e-9)  # in every head
    subject.judge(errors, 0.0)


@pytest.mark.rule("U7")
def test_examples_do_not_meet_in_a_batch(subject: Subject) -> None:
    errors = {}
    for length in (SHORT, LONG):
        module, mask = build_once(subject.name, max_len=MAX_LEN[length]), padding(length)
        q, k, v = draw_qkv(length)
        q = q * torch.tensor([1.0, 2.0], dtype=q.dtype)[:, None, None, None]  # so that batch-wide maxima would show
        together = module(q, k, v, mask)
        for b in range(2):
            alone = module(q[b : b + 1], k[b : b + 1], v[b : b + 1], mask[b : b + 1])
            real = ~mask[b]
            errors[f"L={length}, example {b}"] = deviation(together[b][:, real], alone[0][:, real])
    subject.judge(errors, 1e-6)


@pytest.mark.rule("U8")
def test_gradients_are_those_of_the_forward_pass(subject: Subject) -> None:
    module = build_once(subject.name, max_len=8, num_heads=1, head_dim=4)
    q, k, v = (x.requires_grad_() for x in draw_qkv(5, num_heads=1, head_dim=4))
    mask = torch.tensor([[False] * 5, [False, True, False, False, True]])
    assert torch.autograd.gradcheck(
        lambda *inputs: module(*inputs, mask).masked_fill(mask[:, None, :, None], 0.0), (q, k, v), fast_mode=True
    )


@pytest.mark.rule("U9")
def test_the_state_dict_is_the_whole_function(subject: Subject) -> None:
    module = build(subject.name, seed=0, dtype=torch.float32)
    twin = build(subject.name, seed=1, dtype=torch.float32)
    twin.load_state_dict(module.state_dict())
    inputs, mask = draw_qkv(SHORT, dtype=torch.float32), padding(SHORT)
    assert torch.equal(twin(*inputs, mask), module(*inputs, mask))
    saved = module.state_dict()
    for path, part in module.named_modules():
        assert not part._non_persistent_buffers_set, f"{path} keeps buffers out of the state_dict"
        loose = [key for key, value in vars(part).items() if isinstance(value, torch.Tensor)]
        assert not loose, f"{path} keeps the tensors {loose} as plain attributes"
    assert {name for name, _ in module.named_parameters()} <= set(saved)


@pytest.mark.rule("U10")
def test_half_precision_inputs_stay_close_to_float32(subject: Subject) -> None:
    module, mask = build_once(subject.name, dtype=torch.float32), padding(SHORT)
    half = draw_qkv(SHORT, dtype=torch.bfloat16)
    out = module(*half, mask)
    assert out.dtype == torch.bfloat16
    real = ~mask[:, None].expand(-1, 2, -1)
    subject.judge({"bfloat16": deviation(out.float()[real], module(*(x.float() for x in half), mask)[real])}, 2e-2)


@pytest.mark.rule("U11")
def test_linear_evaluation_equals_the_quadratic_definition(subject: Subject) -> None:
    module, mask = build_once(subject.name), padding(SHORT)
    q, k, v = draw_qkv(SHORT)
    for part in module.modules():
        if isinstance(part, LinearAttention):
            phi_q, phi_k = part.features(q, k, mask)
            num_keys = count_keys(k, mask)
            fast = linear_attention(phi_q, phi_k, v, part.normalizer, num_keys)
            slow = quadratic_attention(phi_q, phi_k, v, part.normalizer, num_keys)
            subject.judge({"phi": deviation(fast, slow), "mix": deviation(part.mix(q, k, v, mask), slow)}, 1e-5)


@pytest.mark.rule("U12")
def test_an_example_without_real_keys_gives_zeros_and_finite_gradients(subject: Subject) -> None:
    module = build_once(subject.name)
    inputs = [x.requires_grad_() for x in draw_qkv(SHORT)]
    mask = torch.zeros(2, SHORT, dtype=torch.bool)
    mask[1] = True
    out = module(*inputs, mask)
    assert not out[1].any()
    assert out.isfinite().all()
    gradients = torch.autograd.grad(out.square().sum(), [*inputs, *module.parameters()], allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.rule("parameter_gradients")
def test_every_parameter_receives_a_gradient(subject: Subject) -> None:
    module = build(subject.name).train()
    if not list(module.parameters()):
        return
    module(*draw_qkv(SHORT), padding(SHORT)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} is not used"
        assert parameter.grad.isfinite().all()


@pytest.mark.rule("determinism")
def test_the_generator_alone_decides_the_draw(subject: Subject) -> None:
    first = build(subject.name)
    torch.manual_seed(random.getrandbits(30))
    state = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    second = build(subject.name)
    inputs = draw_qkv(SHORT)
    assert torch.equal(first(*inputs), second(*inputs))
    assert torch.equal(second(*inputs), second(*inputs))
    assert torch.equal(torch.get_rng_state(), state[0]), "building or evaluating moves torch's global generator"
    assert np.random.get_state()[1].tolist() == state[1], "NumPy's generator was used"
    assert random.getstate() == state[2], "Python's generator was used"


@pytest.mark.rule("length")
@pytest.mark.parametrize("length", [1, 2, 7, 63, 64])
def test_every_length_up_to_max_len_works(subject: Subject, length: int) -> None:
    out = build_once(subject.name)(*draw_qkv(length), padding(length))
    assert out.shape == (2, 2, length, 16)
    assert out.isfinite().all()


@pytest.mark.rule("description")
def test_the_mechanism_describes_itself(subject: Subject) -> None:
    module = build(subject.name)
    assert module.description.paper
    assert "L" in module.description.complexity
    for rule, reason in module.exemptions.items():
        assert rule in RULES, f"{rule} is not a rule of the contract"
        assert len(reason.split()) >= 4, f"the exemption from {rule} needs a sentence, not {reason!r}"


class _LargestTensor(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.rule("memory")
def test_memory_grows_no_faster_than_claimed(subject: Subject) -> None:
    """8 times the length: a linear mechanism's largest tensor grows 8-fold, an L x L matrix 64-fold."""
    module = build(subject.name, max_len=8192, num_heads=1, dtype=torch.float32)
    largest = []
    for length in (1024, 8192):
        inputs = draw_qkv(length, batch=1, num_heads=1, dtype=torch.float32)
        mask = torch.zeros(1, length, dtype=torch.bool)
        mask[:, -5:] = True
        with torch.no_grad(), _LargestTensor() as recorder:
            module(*inputs, mask)
        largest.append(recorder.bytes)
    assert largest[1] < 16 * largest[0], f"{largest} bytes at L = 1024, 8192"
