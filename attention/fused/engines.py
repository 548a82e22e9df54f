"""Owns which fused form of linear attention over Maclaurin features runs where, or that none does.

Legend: B batch, H heads, L length, D head_dim, E columns of v.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from attention.fused import maclaurin
from attention.fused.blocks import Monomials, Prologue, UnitNorm
from attention.normalizers import Normalizer

# of outputs and gradients in `deviation`: a wrong kernel is off by about 1
_TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Engine:
    """`attend` as `attention.fused.maclaurin.maclaurin_attention`, `mean_key` as the function beside it."""

    attend: Callable[..., Tensor]
    mean_key: Callable[..., Tensor]
    takes_bf16: bool  # without turning all of q, k and v to float32 first


_CPU = Engine(maclaurin.maclaurin_attention, maclaurin.mean_key, takes_bf16=False)


def engine_for(q: Tensor, v: Tensor) -> Engine | None:
    """The fused form for q [B, H, L, D] and v [B, H, L, E]; None: the plain one has to run.

    On a CPU blocks in cache; on CUDA Triton, where it is installed, from compute capability 8.0 on, for float32 and
    bf16 and for D and E up to 128.
    """
    if q.device.type == "cpu":
        return _CPU
    if q.device.type != "cuda" or q.dtype != v.dtype or min(q.numel(), v.numel()) == 0:
        return None
    return _on_gpu(q.device, v.dtype, q.shape[3], v.shape[3])


@cache
@torch.compiler.disable
def _on_gpu(device: torch.device, dtype: torch.dtype, dim: int, columns: int) -> Engine | None:
    """Once per process and shape the kernels are built, run and compared: they depend on a compiler on the user's
    machine, and training must neither stop nor go wrong for want of it."""
    if importlib.util.find_spec("triton") is None:
        return None
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return None
    try:
        triton_engine = gpu_engine()
        from attention.fused.triton_maclaurin import DTYPES, LARGEST

        if dtype not in DTYPES or max(dim, columns) > LARGEST:
            return None
        error = deviation(triton_engine, device, dtype, dim, columns)
    except Exception as failure:
        reason = f"{type(failure).__name__}: {failure}"
    else:
        if error < _TOLERANCES[dtype]:
            return triton_engine
        reason = f"its result differs from the definition's by {error:.2g}"
    warnings.warn(f"fused attention on {device} is out of use, the plain form runs: {reason}", stacklevel=2)
    return None


def gpu_engine() -> Engine:
    """Needs triton."""
    module = importlib.import_module("attention.fused.triton_maclaurin")
    return Engine(module.maclaurin_attention, module.mean_key, takes_bf16=True)


def deviation(engine: Engine, device: torch.device, dtype: torch.dtype, dim: int, columns: int) -> float:
    """Largest relative error of the output and of every gradient against the CPU's form in float64, on 75 tokens."""
    generator = torch.Generator().manual_seed(0)
    levels = (9, 9, 4, 1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    matrix = torch.randn(sum(levels), dim, generator=generator) * dim**-0.5
    linear = torch.randn(dim, dim, generator=generator) * 0.1 / dim
    leaves = [*(draw(2, 2, 75, size) for size in (dim, dim, columns)), torch.tensor([1.5, 0.7])[:, None, None]]
    weight, mask = draw(2, 2, 75, columns), torch.zeros(2, 75, dtype=torch.bool)
    mask[0, 60:] = True

    def run(engine: Engine, device: torch.device, inner: torch.dtype, outer: torch.dtype) -> list[Tensor]:
        q, k, v = (x.to(device, outer).requires_grad_() for x in leaves[:3])
        scale = leaves[3].to(device, inner).requires_grad_()
        monomials = Monomials(2.0, linear.to(device, inner), matrix.to(device, inner), levels)
        prologue = Prologue(UnitNorm(1e-6, True), scale, None)
        num_keys = (~mask).sum(dim=1).to(device, inner)[:, None, None, None]
        normalizer = Normalizer("signed_clamp", 0.1, True)
        out = engine.attend(monomials, q, k, v, mask.to(device), (prologue, prologue), None, normalizer, num_keys)
        gradients = torch.autograd.grad(out, [q, k, v, scale], weight.to(device, outer))
        return [x.detach().cpu().double() for x in (out, *gradients)]

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        ours = run(engine, device, torch.float32, dtype)
        expected = run(_CPU, torch.device("cpu"), torch.float64, torch.float64)
    errors = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, expected, strict=True)]
    return float(torch.stack(errors).nan_to_num(torch.inf).max())
