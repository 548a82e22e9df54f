"""Owns the comparisons of the GPU op with its plain twin: a program, because Triton's interpreter has to be chosen
before triton is imported. `TRITON_INTERPRET=1 python -m tests.attention.triton_checks cpu bf16`, or `... cuda bf16` without the
variable, prints one JSON object: case -> largest relative errors of the output and of each gradient."""

import json
import sys
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from attention.base import HeadShape, count_keys
from attention.feature_maps import maclaurin
from attention.feature_maps.degrees import Counts, DegreeLaw, Geometric, KernelLaw
from attention.feature_maps.maclaurin import Maclaurin
from attention.fused.engines import Engine, deviation, gpu_engine
from attention.kernels import Exp, Kernel, Log
from attention.linear import LinearAttention, linear_attention
from attention.normalizers import Normalizer
from attention.projections.signs import Rademacher
from attention.schoenbat import SchoenbAt
from tests.attention.conftest import build, draw, draw_qkv, padding

PUBLISHED = Geometric(base=2.0, max_degree=20, sampling="iid")
LAWS: dict[str, tuple[int, DegreeLaw]] = {
    "all degrees": (-1, Counts({0: 3, 1: 4, 2: 5, 5: 2}, shrinkage=False)),
    "constants": (-1, Counts({0: 14}, shrinkage=False)),
    "degree 3": (0, Counts({3: 13}, shrinkage=False)),
    "gap": (0, Counts({2: 6, 7: 7}, shrinkage=False)),
    "exact 1, stratified": (1, KernelLaw(max_degree=20, sampling="stratified")),
    "no random": (1, KernelLaw(max_degree=20, sampling="stratified")),
}
POLICIES = ("clamp_min", "abs_clamp", "signed_clamp", "sum_plus", "none")


def plain(module: SchoenbAt, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The definition: pre-SBN, features [B, H, L, F], two products, division, post-SBN; rows without keys are 0."""
    seen = None if mask is None else mask & ~mask.all(dim=-1, keepdim=True)
    x, y = module.regularize(q, k, seen)
    phi_x, phi_y = module.linear.features(x, y, seen)
    out = module.post(linear_attention(phi_x, phi_y, v, module.linear.normalizer, count_keys(k, seen)))
    return out if mask is None else out.masked_fill(mask.all(dim=-1)[:, None, None, None], 0.0)


def linear(
    kernel: Kernel, law: DegreeLaw, exact_degree: int, num_features: int, centred: bool = False,
    normalizer: Normalizer | None = None,
) -> LinearAttention:  # fmt: skip
    def feature_map(shape: HeadShape, generator: torch.Generator) -> Maclaurin:
        return Maclaurin(
            shape, generator, kernel=kernel, num_features=num_features, exact_degree=exact_degree, degree_law=law,
            projection=Rademacher(), centred=centred,
        )  # fmt: skip

    return LinearAttention(
        HeadShape(2, 8, 64), torch.Generator().manual_seed(0), feature_map=feature_map,
        normalizer=normalizer or Normalizer("clamp_min", 1e-6, True),
    )  # fmt: skip


def outputs_and_gradients(function, inputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = function(*inputs)
    weight = draw(*out.shape, seed=77, scale=1.0).to(out.device, out.dtype)
    gradients = torch.autograd.grad(
        (out * weight).sum(), [*inputs, *parameters], allow_unused=True, materialize_grads=True
    )
    return [x.detach().cpu().double() for x in (out, *gradients)]


def errors(fused: list[Tensor], expected: list[Tensor]) -> list[float]:
    """Relative to the largest entry of each."""
    pairs = zip(fused, expected, strict=True)
    return [((a - b).abs().max() / b.abs().max().clamp_min(1e-3)).nan_to_num(torch.inf).item() for a, b in pairs]


Check = Callable[[str], list[float]]  # device -> relative errors


def mechanism(
    name: str, length: int, mask: Tensor | None, head_dim: int, dtype: torch.dtype, device: str
) -> list[float]:
    """A file of conf/attention/ by the GPU op against its definition in float64, on the same numbers."""
    fused, exact = (build(name, head_dim=head_dim, dtype=d) for d in (torch.float32, torch.float64))
    with torch.no_grad():
        for a, b in zip(fused.parameters(), exact.parameters(), strict=True):
            a.add_(draw(*a.shape, seed=5, scale=0.3).float())
            b.copy_(a)
    fused, seen = fused.to(device), None if mask is None else mask.to(device)
    inputs = [x.to(dtype) for x in draw_qkv(length, head_dim=head_dim)]
    found = outputs_and_gradients(lambda *x: fused(*x, seen), [x.to(device) for x in inputs], list(fused.parameters()))
    wide = [x.double() for x in inputs]
    return errors(found, outputs_and_gradients(lambda *x: plain(exact, *x, mask), wide, list(exact.parameters())))


def slot(
    build_linear: Callable[[], LinearAttention], inputs: list[Tensor], mask: Tensor | None, device: str
) -> list[float]:
    """Linear attention alone, without pre-SBN."""
    fused, exact = build_linear().to(device), build_linear().double()
    seen = None if mask is None else mask.to(device)

    def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(*exact.features(q, k, mask), v, exact.normalizer, count_keys(k, mask))

    found = outputs_and_gradients(lambda *x: fused.mix(*x, seen), [x.float().to(device) for x in inputs], [])
    return errors(found, outputs_and_gradients(naive, [x.float().double() for x in inputs], []))


def layouts(device: str) -> list[float]:
    """Views of [B, L, H, D], other strides and an expanded gradient against contiguous tensors."""
    module = build("schoenbat_plus_exp", head_dim=8, dtype=torch.float32).to(device)
    inputs = [x.to(device) for x in draw_qkv(19, head_dim=8, dtype=torch.float32)]

    def run(given: list[Tensor]) -> list[Tensor]:
        given = [x.detach().requires_grad_() for x in given]
        out = module(*given, None)
        return [out.detach(), *torch.autograd.grad(out.sum(), given)]

    q, k, v = inputs
    views = [
        q.transpose(1, 2).contiguous().transpose(1, 2),
        k.transpose(2, 3).contiguous().transpose(2, 3),
        torch.stack([v, v], dim=-1)[..., 0],
    ]
    return errors(run(views), run(inputs))


def long_pieces(device: str) -> list[float]:
    """Programs that take several blocks of tokens each, the last one in part."""
    from attention.fused import triton_launch

    with mock.patch.object(triton_launch, "_PROGRAMS", 8):
        return mechanism("schoenbat_plus_exp", 140, padding(140), 8, torch.float32, device)


def empty_row(length: int) -> Tensor:
    """The first example has no real key."""
    mask = padding(length)
    mask[0] = True
    return mask


def checks() -> dict[str, dict[str, Check]]:
    single, half = torch.float32, torch.bfloat16
    shapes = {
        "schoenbat_exp, D=20, padded": ("schoenbat_exp", 37, padding(37), 20, single),
        "schoenbat_exp, D=32, without keys": ("schoenbat_exp", 40, empty_row(40), 32, single),
        "schoenbat_plus_exp, D=64": ("schoenbat_plus_exp", 37, None, 64, single),
        "schoenbat_exp, D=128": ("schoenbat_exp", 21, None, 128, single),
        "schoenbat_exp, one token": ("schoenbat_exp", 1, None, 16, single),
        "schoenbat_plus_exp, padded": ("schoenbat_plus_exp", 37, padding(37), 16, single),
        "schoenbat_plus_log, padded": ("schoenbat_plus_log", 75, padding(75), 16, single),
        "rmfa, padded": ("rmfa", 37, padding(37), 16, single),
    }
    halves = {
        "bf16 schoenbat_exp, padded": ("schoenbat_exp", 37, padding(37), 20, half),
        "bf16 schoenbat_plus_log": ("schoenbat_plus_log", 37, None, 16, half),
    }
    inputs, some = list(draw_qkv(37, head_dim=8)), [draw_qkv(23, head_dim=8, seed=4)[0], *draw_qkv(37, head_dim=8)[1:]]
    wide = list(draw_qkv(37, head_dim=8, scale=1.5))
    laws = {
        name: partial(slot, partial(linear, Exp(), law, exact, 9 if name == "no random" else 14), inputs, padding(37))
        for name, (exact, law) in LAWS.items()
    }
    laws["published, many tiles"] = partial(slot, partial(linear, Exp(), PUBLISHED, 0, 160), inputs, None)
    centred = partial(linear, Log(), PUBLISHED, 0, 40, centred=True)
    laws["own constants, cross-attention"] = partial(slot, centred, [x * 0.4 for x in some], padding(37))
    normalizers = {
        f"{policy}, {constant}": partial(
            slot, partial(linear, Exp(), PUBLISHED, 0, 40, normalizer=Normalizer(policy, constant, constant > 0.1)), wide, None
        )
        for policy in POLICIES for constant in ((1e-6, 0.9) if policy == "clamp_min" else (0.9,))
    }  # fmt: skip
    return {
        "mechanisms": {name: partial(mechanism, *case) for name, case in shapes.items()},
        "bf16": {name: partial(mechanism, *case) for name, case in halves.items()},
        "degrees": laws,
        "normalisers": normalizers,
        "layouts": {"strides": layouts, "long pieces": long_pieces},
        "self-check": {
            f"{dtype}, D={dim}, E={columns}": partial(self_check, dtype, dim, columns)
            for dtype, dim, columns in ((single, 20, 33),)
        },
    }  # fmt: skip


def self_check(dtype: torch.dtype, dim: int, columns: int, device: str) -> list[float]:
    return [deviation(gpu_engine(), torch.device(device), dtype, dim, columns)]


def compiled(capability: int) -> None:
    """Raises where a kernel, called as the op calls it, does not compile for that GPU; needs none. Nothing is launched,
    so results are rubbish."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Absent:
        """A driver without a GPU."""

        get_current_target = staticmethod(lambda: GPUTarget("cuda", capability, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    driver.set_active(Absent())
    run = JITFunction.run
    kernels = set()

    def compile_only(self, *args, grid, warmup, **kwargs) -> None:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.metadata.shared <= 99 * 1024, f"{self.fn.__name__} needs {kernel.metadata.shared} bytes"
        kernels.add(self.fn.__name__)

    module = build("schoenbat_plus_log", head_dim=20, dtype=torch.float32)  # with all that a kernel can be given
    inputs = [x.bfloat16() for x in draw_qkv(37, head_dim=20)]
    with mock.patch.object(JITFunction, "run", compile_only):
        outputs_and_gradients(lambda *x: module(*x, padding(37)), inputs, list(module.parameters()))
    assert len(kernels) == 4, kernels


def main(device: str, *groups: str) -> None:
    torch.set_num_threads(1)
    engine: Engine = gpu_engine()
    with mock.patch.object(maclaurin, "engine_for", side_effect=lambda q, v: engine):
        if groups == ("compiled",):
            return compiled(int(device))
        found = {name: check(device=device) for group in groups for name, check in checks()[group].items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
