"""The fused form of SchoenbAt is its plain twin: outputs, every gradient, masks, odd lengths, all block shapes."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import attention.fused.blocks as blocks
from attention.base import HeadShape, count_keys
from attention.feature_maps.degrees import Counts, DegreeLaw, Geometric, KernelLaw
from attention.feature_maps.maclaurin import Maclaurin
from attention.fused.blocks import Prologue
from attention.kernels import Exp, Inverse, Kernel, Log, Sqrt
from attention.linear import LinearAttention, linear_attention, quadratic_attention
from attention.normalizers import Normalizer
from attention.projections.signs import ComplexRademacher, Rademacher
from attention.schoenbat import SchoenbAt
from tests.attention.conftest import build, draw, draw_qkv, padding

PUBLISHED = Geometric(base=2.0, max_degree=20, sampling="iid")
KEEP = Normalizer("clamp_min", 1e-6, True)


def plain(module: SchoenbAt, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The definition: pre-SBN, features [B, H, L, F], two products, division, post-SBN, each on its own."""
    x, y = module.regularize(q, k, mask)
    phi_x, phi_y = module.linear.features(x, y, mask)
    return module.post(linear_attention(phi_x, phi_y, v, module.linear.normalizer, count_keys(k, mask)))


def linear(
    *, kernel: Kernel, law: DegreeLaw = PUBLISHED, num_features: int = 40, exact_degree: int = 0, centred: bool = False,
    normalizer: Normalizer = KEEP, projection=None, seed: int = 0,
) -> LinearAttention:  # fmt: skip
    def feature_map(shape: HeadShape, generator: torch.Generator) -> Maclaurin:
        return Maclaurin(
            shape, generator, kernel=kernel, num_features=num_features, exact_degree=exact_degree, degree_law=law,
            projection=projection or Rademacher(), centred=centred,
        )  # fmt: skip

    generator = torch.Generator().manual_seed(seed)
    return LinearAttention(HeadShape(2, 8, 64), generator, feature_map=feature_map, normalizer=normalizer).double()


def outputs_and_gradients(function, inputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = draw(*out.shape, seed=77, scale=1.0, dtype=out.dtype)
    loss = (out * weight).sum()
    return [out, *torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True, materialize_grads=True)]


def assert_same(fused: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for i, (a, b) in enumerate(zip(fused, expected, strict=True)):
        error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).item()
        assert error < tolerance, f"{'output' if i == 0 else f'gradient {i}'} differs by {error:.2g}"


@pytest.fixture(params=[2**21, 2**13], ids=["one block", "many blocks"])
def block_bytes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", request.param)
    return request.param


@pytest.mark.parametrize("masked", [False, True], ids=["all real", "padded"])
@pytest.mark.parametrize("length", [1, 37, 150])
@pytest.mark.parametrize(
    "name",
    ["schoenbat_exp", "schoenbat_inverse", "schoenbat_plus_exp", "schoenbat_plus_sqrt", "schoenbat_plus_log", "rmfa"],
)
def test_the_fused_form_is_the_plain_one(name: str, length: int, masked: bool, block_bytes: int) -> None:
    module = build(name)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(draw(*parameter.shape, seed=5, scale=0.3))
    mask = padding(length) if masked and length > 1 else None
    inputs, parameters = list(draw_qkv(length)), list(module.parameters())
    fused = outputs_and_gradients(lambda *x: module(*x, mask), inputs, parameters)
    assert_same(fused, outputs_and_gradients(lambda *x: plain(module, *x, mask), inputs, parameters), 1e-9)


@pytest.mark.parametrize(
    ("exact_degree", "law"),
    [
        (-1, Counts({0: 3, 1: 4, 2: 5, 5: 2}, shrinkage=False)),
        (-1, Counts({0: 14}, shrinkage=False)),
        (0, Counts({1: 13}, shrinkage=False)),
        (0, Counts({3: 13}, shrinkage=False)),
        (0, Counts({2: 6, 7: 7}, shrinkage=False)),
        (1, Counts({2: 5}, shrinkage=False)),
        (1, KernelLaw(max_degree=20, sampling="stratified")),
    ],
)
def test_every_spread_of_degrees_gives_the_same_function(exact_degree: int, law: DegreeLaw, block_bytes: int) -> None:
    """Constants and degree 1 are summed up, deeper products shrink level by level: no level may be lost on the way."""
    module, mask = linear(kernel=Exp(), law=law, num_features=14, exact_degree=exact_degree), padding(37)

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        phi_q, phi_k = module.features(q, k, mask)
        return quadratic_attention(phi_q, phi_k, v, module.normalizer, count_keys(k, mask))

    inputs = list(draw_qkv(37, head_dim=8))
    fused = outputs_and_gradients(lambda *x: module(*x, mask), inputs, [])
    assert_same(fused, outputs_and_gradients(naive, inputs, []), 1e-9)


@pytest.mark.parametrize("policy", ["clamp_min", "abs_clamp", "signed_clamp", "sum_plus", "none"])
@pytest.mark.parametrize("constant", [1e-6, 0.9])
def test_every_normaliser_keeps_its_gradient(policy: str, constant: float) -> None:
    module = linear(kernel=Inverse(), normalizer=Normalizer(policy, constant, True))  # type: ignore[arg-type]
    q, k, v = draw_qkv(37, head_dim=8, scale=1.5)
    phi_q, phi_k = module.features(q, k, None)
    denominators = phi_q @ phi_k.sum(dim=2).unsqueeze(-1)
    assert constant < 0.5 or bool((denominators / 37 < constant).any()), "the floor is never active: nothing is tested"

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(*module.features(q, k, None), v, module.normalizer, count_keys(k, None))

    fused = outputs_and_gradients(module, [q, k, v], [])
    assert_same(fused, outputs_and_gradients(naive, [q, k, v], []), 1e-8)


@pytest.mark.parametrize("kernel", [Exp(), Inverse(), Log(), Sqrt()])
def test_centred_queries_of_another_length_agree(kernel: Kernel) -> None:
    """Cross-attention: 23 queries, 37 keys."""
    module = linear(kernel=kernel, centred=True)
    q, (_, k, v) = draw_qkv(23, head_dim=8, seed=4, scale=0.2)[0], draw_qkv(37, head_dim=8, scale=0.2)

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(*module.features(q, k, None), v, module.normalizer, count_keys(k, None))

    fused = outputs_and_gradients(lambda *x: module.mix(*x, None), [q, k, v], [])
    assert_same(fused, outputs_and_gradients(naive, [q, k, v], []), 1e-9)


def test_a_prologue_in_blocks_is_its_definition() -> None:
    """Also for a constant token, whose norm is at its floor, in value and gradient."""
    module = build("schoenbat_exp")
    q, k, v = draw_qkv(37)
    q[0, 0, 3], k[1, 1, 5] = 0.7, -0.2
    fused = outputs_and_gradients(lambda *x: module(*x, None), [q, k, v], [])
    expected = outputs_and_gradients(lambda *x: plain(module, *x, None), [q, k, v], [])
    for a, b in zip(fused, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    unit = module.pre_q.unit
    torch.testing.assert_close(Prologue(unit, None, None).apply(q), module.pre_q(q, None))


@pytest.mark.parametrize("name", ["schoenbat_exp", "schoenbat_plus_inverse"])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_float32_stays_close_to_float64(name: str, scale: float) -> None:
    single, double = build(name, dtype=torch.float32), build(name)
    inputs = list(draw_qkv(150, scale=scale))
    ours = outputs_and_gradients(lambda *x: single(*x, None), [x.float() for x in inputs], [])
    assert_same([x.double() for x in ours], outputs_and_gradients(lambda *x: double(*x, None), inputs, []), 2e-4)


def test_any_memory_layout_of_the_inputs_gives_the_same_result() -> None:
    module, inputs = build("schoenbat_plus_exp"), draw_qkv(37)
    layouts = [
        [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs],  # views of [B, L, H, D]
        [x.transpose(2, 3).contiguous().transpose(2, 3) for x in inputs],
        [torch.stack([x, x], dim=-1)[..., 0] for x in inputs],
    ]
    expected = outputs_and_gradients(lambda *x: module(*x, None), list(inputs), [])
    for layout in layouts:
        for a, b in zip(outputs_and_gradients(lambda *x: module(*x, None), layout, []), expected, strict=True):
            torch.testing.assert_close(a, b)


class _Live(TorchDispatchMode):
    """The largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


def test_no_features_of_a_whole_sequence_are_ever_stored() -> None:
    """Forward and backward: nothing larger than one of q, k, v."""
    module = build("schoenbat_exp", head_dim=32, max_len=16384, dtype=torch.float32)
    inputs = [x.requires_grad_() for x in draw_qkv(16384, batch=1, head_dim=32, dtype=torch.float32)]
    with _Live() as live:
        torch.autograd.grad(module(*inputs).sum(), inputs)
    assert live.largest <= inputs[0].untyped_storage().nbytes()


def test_maps_without_a_fused_form_say_so() -> None:
    q, k, v = draw_qkv(9, head_dim=8)
    for module in (linear(kernel=Exp(), exact_degree=2, num_features=60), linear(kernel=Exp(), projection=ComplexRademacher(), num_features=41)):  # fmt: skip
        assert module.feature_map.fused(q, k, v, None, module.normalizer, count_keys(k, None)) is None
        assert module(q, k, v).isfinite().all()
    module = linear(kernel=Exp())
    assert module.feature_map.fused(q, k, v, None, module.normalizer, count_keys(k, None)) is not None
