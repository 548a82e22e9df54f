"""Owns the study of estimator error: random features against the kernels they estimate, at equal numbers of features.

Every draw is one draw of features and one of q, k, v, the same for all estimators. Two errors are measured:

kernel   root mean square of K^ - K over the L x L pairs, K the kernel matrix. Estimators that fix each row of K up to a
         factor (`row_scaled` in conf/) get the factor that gives the row its exact sum.
output   |out^ - out| / |out - mean pooling|: the attention output's error in units of the signal, i.e. of what attention
         adds to the plain mean of the values. 1 means that the estimate is no better than uniform attention.

Medians over draws with distribution-free 95 % intervals: at large radius single draws fail by orders of magnitude.
"""

import copy
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from lra.display import RunBar, display
from lra.studies.estimator_error_report import error_figure, error_tables, time_table, verdicts
from lra.studies.runner import Outputs, median_and_interval


class Inputs(NamedTuple):
    """q, k, v [1, H, L, D]; q and k as a pre-SBN leaves them: unit norm, mean 0 over channels."""

    q: Tensor
    k: Tensor
    v: Tensor


class Case(NamedTuple):
    """One panel of the study: kernel, radius and data."""

    kernel: str
    radius: str
    data: str


def run(config: DictConfig, outputs: Outputs) -> None:
    """The study that conf/experiment/estimator_error.yaml configures."""
    config = copy.deepcopy(config)  # cells are set in place
    study = config.study
    cases = [
        Case(kernel, radius, data)
        for radius, entry in study.temperatures.items()
        for kernel in entry.kernels
        for data in study.data
    ]
    rows: list[dict[str, Any]] = []
    with display.run("estimator error", study.draws * len(cases)) as bar:
        for place, case in enumerate(cases):
            rows += measure_case(study, case, outputs, bar, place)
    errors = pd.DataFrame(rows)
    times = pd.DataFrame(measure_times(study, outputs))
    labels = {name: str(entry.label) for name, entry in study.estimators.items()}
    outputs.frame("errors", errors)
    outputs.frame("times", times)
    for name, table in error_tables(errors, labels, outputs.notes()):
        outputs.table(name, table)
    outputs.table("times_table", time_table(times, labels, outputs.notes()))
    for data in study.data:
        for metric in ("output", "kernel"):
            figure = error_figure(
                errors[errors["data"] == data], metric, labels, f"{data} q and k, {study.draws} draws"
            )
            outputs.figure(f"{metric}_error_{data.replace(' ', '_')}", figure)
    for verdict in verdicts(errors, times):
        outputs.verdict(verdict)


def measure_case(study: DictConfig, case: Case, outputs: Outputs, bar: RunBar, place: int) -> list[dict[str, Any]]:
    """One row per estimator and width."""
    temperature = study.temperatures[case.radius].value
    study.cell.kernel, study.cell.temperature = f"${{study.kernels.{case.kernel}}}", temperature
    shape = instantiate(study.shape)
    exact = instantiate(study.exact)(shape, torch.Generator()).to(outputs.device)
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    factories = {(name, width): _factories(study, name, width) for name, width in widths(study, case.kernel)}
    for draw in range(study.draws):
        seed = 1_000_003 * outputs.seed + draw
        inputs = draw_inputs(shape, study.length, study.data[case.data], seed, outputs.device)
        kernel = exact(inputs.q, inputs.k, _identity(inputs.v))
        out = kernel @ inputs.v / kernel.sum(dim=-1, keepdim=True)
        for key, pair in factories.items():
            entry = study.estimators[key[0]]
            scale = temperature**0.5 if entry.get("unit_inputs", False) else 1.0
            given = Inputs(scale * inputs.q, scale * inputs.k, inputs.v)
            estimate = _estimate(pair, shape, seed, given, kernel.sum(dim=-1, keepdim=True))
            found.setdefault(key, []).append(errors_of(*estimate, kernel, out, inputs.v))
        bar.update(place * study.draws + draw + 1)
    return [_row(case, study, name, width, draws) for (name, width), draws in found.items()]


def _row(case: Case, study: DictConfig, name: str, width: int, draws: list[tuple[float, float]]) -> dict[str, Any]:
    row: dict[str, Any] = {
        **case._asdict(), "squared_radius": study.temperatures[case.radius].radius, "estimator": name,
        "num_features": width, "draws": len(draws),
    }  # fmt: skip
    for place, metric in enumerate(("kernel", "output")):
        middle, low, high = median_and_interval([draw[place] for draw in draws])
        row |= {f"{metric}_error": middle, f"{metric}_error_low": low, f"{metric}_error_high": high}
    return row


def widths(study: DictConfig, kernel: str) -> Iterator[tuple[str, int]]:
    """The estimators that apply to this kernel, each with every width that it can have."""
    for name, entry in study.estimators.items():
        if kernel in entry.get("kernels", [kernel]):
            possible = [entry.width] if "width" in entry else study.num_features
            yield from ((str(name), width) for width in possible if width >= entry.get("least", 1))


def _factories(study: DictConfig, name: str, width: int) -> tuple[Any, Any]:
    """The attention's factory, and that of the same without its normaliser (None for one that fixes rows to a factor
    only)."""
    study.cell.num_features = width
    entry = study.estimators[name]
    own = instantiate(entry.attention)
    if entry.get("row_scaled", False):
        return own, None
    normalizer = copy.deepcopy(entry.attention.normalizer)
    entry.attention.normalizer.policy = "none"
    bare = instantiate(entry.attention)
    entry.attention.normalizer = normalizer
    return own, bare


@torch.no_grad()
def _estimate(
    factories: tuple[Any, Any], shape: Any, seed: int, inputs: Inputs, row_sums: Tensor
) -> tuple[Tensor, Tensor]:
    """The estimated kernel matrix [1, H, L, L] and output [1, H, L, D]."""
    own, bare = (f and f(shape, torch.Generator().manual_seed(seed)).to(inputs.q.device).eval() for f in factories)
    if bare is not None:
        return bare(inputs.q, inputs.k, _identity(inputs.v)), own(inputs.q, inputs.k, inputs.v)
    both = own(inputs.q, inputs.k, torch.cat([inputs.v, _identity(inputs.v)], dim=-1))
    width = inputs.v.shape[-1]
    return both[..., width:] * row_sums, both[..., :width]


def errors_of(
    estimated_kernel: Tensor, estimated_out: Tensor, kernel: Tensor, out: Tensor, v: Tensor
) -> tuple[float, float]:
    """The two errors that this file's head defines."""
    signal = (out - v.mean(dim=2, keepdim=True)).norm()
    return float((estimated_kernel - kernel).square().mean().sqrt()), float((estimated_out - out).norm() / signal)


def draw_inputs(shape: Any, length: int, share: float, seed: int, device: torch.device) -> Inputs:
    """Gaussian v; q and k uniform on the sphere orthogonal to (1, .., 1), around a random direction common to both:
    x = sqrt(share) direction + sqrt(1 - share) noise before normalisation, both of unit squared norm in the mean."""
    generator = torch.Generator().manual_seed(seed + 500_000_003)
    size = (3, 1, shape.num_heads, length, shape.head_dim)
    noise = torch.randn(size, generator=generator)
    direction = _unit(torch.randn(1, shape.num_heads, 1, shape.head_dim, generator=generator))
    q, k = (_unit(share**0.5 * direction + ((1 - share) / (shape.head_dim - 1)) ** 0.5 * part) for part in noise[:2])
    return Inputs(q.to(device), k.to(device), noise[2].to(device))


def _unit(x: Tensor) -> Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True)


def _identity(v: Tensor) -> Tensor:
    """Values [1, H, L, L] whose attention output is the matrix of weights."""
    return torch.eye(v.shape[2], device=v.device).expand(*v.shape[:2], -1, -1)


def measure_times(study: DictConfig, outputs: Outputs) -> list[dict[str, Any]]:
    """Milliseconds of a forward pass with the exp kernel, the estimators in turns so that drift meets all alike."""
    timing = study.timing
    study.cell.kernel, study.cell.temperature = "${study.kernels.exp}", 1.0
    shape = instantiate(timing.shape)
    generator = torch.Generator().manual_seed(outputs.seed)
    size = (3, timing.batch_size, shape.num_heads, shape.max_len, shape.head_dim)
    q, k, v = (x.to(outputs.device) for x in torch.randn(size, generator=generator))
    modules = {}
    for name, width in widths(study, "exp"):
        if width == study.estimators[name].get("width", timing.num_features):
            factory, _ = _factories(study, name, width)
            modules[name, width] = factory(shape, torch.Generator().manual_seed(outputs.seed)).to(outputs.device).eval()
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in modules}
    with torch.no_grad():
        for turn in range(timing.rounds + 2):  # two to warm up
            for key, module in modules.items():
                taken = _timed(module, q, k, v)
                if turn >= 2:
                    seconds[key].append(taken)
    reference = pd.Series(seconds["published", timing.num_features])
    rows = []
    for (name, width), taken in seconds.items():
        middle, low, high = median_and_interval((pd.Series(taken) / reference).tolist())
        rows.append(
            {
                "estimator": name,
                "num_features": width,
                "length": shape.max_len,
                "batch_size": timing.batch_size,
                "num_heads": shape.num_heads,
                "head_dim": shape.head_dim,
                "rounds": timing.rounds,
                "milliseconds": 1e3 * pd.Series(taken).median(),
                "ratio_to_published": middle,
                "ratio_low": low,
                "ratio_high": high,
            }  # fmt: skip
        )
    return rows


def _timed(module: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor) -> float:
    if q.is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    module(q, k, v)
    if q.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
