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
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from lra.display import RunBar, display
from lra.studies.estimator_error_report import error_figure, error_tables, time_table, verdicts
from lra.studies.runner import Outputs, median_and_interval


class Inputs(NamedTuple):
    """q, k, v [B, H, L, D], one example per kind of data; q, k as a pre-SBN leaves them: unit norm, mean 0 in a token."""

    q: Tensor
    k: Tensor
    v: Tensor


class Case(NamedTuple):
    """One panel of the study."""

    kernel: str
    radius: str


def run(config: DictConfig, outputs: Outputs) -> None:
    """The study that conf/experiment/estimator_error.yaml configures."""
    config = copy.deepcopy(config)  # cells are set in place
    study = config.study
    cases = [Case(kernel, radius) for radius, entry in study.temperatures.items() for kernel in entry.kernels]
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
    """One row per estimator, width and kind of data."""
    study.cell.kernel, study.cell.temperature = (
        f"${{study.kernels.{case.kernel}}}",
        study.temperatures[case.radius].value,
    )
    shape = instantiate(study.shape)
    exact = instantiate(study.exact)(shape, torch.Generator()).to(outputs.device)
    estimators = {(name, width): estimator(study, name, width) for name, width in widths(study, case.kernel)}
    found: dict[tuple[str, int], list[Tensor]] = {key: [] for key in estimators}
    for draw in range(study.draws):
        seed = 1_000_003 * outputs.seed + draw
        inputs = draw_inputs(shape, study.length, list(study.data.values()), seed, outputs.device)
        kernel = exact(inputs.q, inputs.k, _identity(inputs.v))
        row_sums = kernel.sum(dim=-1, keepdim=True)
        out = kernel @ inputs.v / row_sums
        for key, which in estimators.items():
            estimated = estimate(which, shape, seed, inputs, row_sums)
            found[key].append(errors_of(*estimated, kernel, out, inputs.v))
        bar.update(place * study.draws + draw + 1)
    rows = []
    for (name, width), draws in found.items():
        for data, errors in zip(study.data, torch.stack(draws, dim=1), strict=True):  # [draws, 2]
            rows.append(
                {
                    **case._asdict(), "data": data, "squared_radius": study.temperatures[case.radius].radius,
                    "estimator": name, "num_features": width, "draws": len(draws),
                    **_summary("kernel_error", errors[:, 0]), **_summary("output_error", errors[:, 1]),
                }
            )  # fmt: skip
    return rows


def _summary(name: str, values: Tensor) -> dict[str, float]:
    middle, low, high = median_and_interval(values.tolist())
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def widths(study: DictConfig, kernel: str) -> Iterator[tuple[str, int]]:
    """The estimators that apply to this kernel, each with every width that it can have."""
    for name, entry in study.estimators.items():
        if kernel in entry.get("kernels", [kernel]):
            possible = [entry.width] if "width" in entry else study.num_features
            yield from ((str(name), width) for width in possible if width >= entry.get("least", 1))


class Estimator(NamedTuple):
    """An attention's factory and, where its own normaliser was taken out so that sums show, that normaliser."""

    factory: Any
    normalizer: Any | None
    input_scale: float


def estimator(study: DictConfig, name: str, width: int) -> Estimator:
    """The estimator of this name in the study's present cell. One that fixes rows to a factor keeps its normaliser."""
    study.cell.num_features = width
    entry = study.estimators[name]
    scale = study.cell.temperature**0.5 if entry.get("unit_inputs", False) else 1.0
    node = attention_node(entry)
    if entry.get("row_scaled", False):
        return Estimator(instantiate(node), None, scale)
    normalizer = instantiate(node.normalizer)
    node.normalizer.policy = "none"
    return Estimator(instantiate(node), normalizer, scale)


def attention_node(entry: DictConfig) -> DictConfig:
    """A copy of the estimator's attention with its `replace` put in; interpolations still see the present cell."""
    node = copy.deepcopy(entry.attention)
    for key, value in entry.get("replace", {}).items():
        OmegaConf.update(node, key, value, merge=False)
    return node


@torch.no_grad()
def estimate(which: Estimator, shape: Any, seed: int, inputs: Inputs, row_sums: Tensor) -> tuple[Tensor, Tensor]:
    """The estimated kernel matrix [B, H, L, L] and output [B, H, L, D] of one draw of features."""
    module = which.factory(shape, torch.Generator().manual_seed(seed)).to(inputs.q.device).eval()
    q, k, v = which.input_scale * inputs.q, which.input_scale * inputs.k, inputs.v
    both = module(q, k, torch.cat([v, _identity(v)], dim=-1))
    out, kernel = both.split([v.shape[-1], v.shape[-2]], dim=-1)
    if which.normalizer is None:
        return kernel * row_sums, out
    num_keys = torch.full_like(v[:, :1, :1, :1], v.shape[2])
    return kernel, which.normalizer.divide(out, kernel.sum(dim=-1, keepdim=True), num_keys)


def errors_of(estimated_kernel: Tensor, estimated_out: Tensor, kernel: Tensor, out: Tensor, v: Tensor) -> Tensor:
    """The two errors that this file's head defines, [B, 2]."""
    dims = (1, 2, 3)
    signal = (out - v.mean(dim=2, keepdim=True)).square().sum(dims)
    output = ((estimated_out - out).square().sum(dims) / signal).sqrt()
    return torch.stack([(estimated_kernel - kernel).square().mean(dims).sqrt(), output], dim=-1).cpu()


def draw_inputs(shape: Any, length: int, shares: list[float], seed: int, device: torch.device) -> Inputs:
    """Gaussian v; q and k uniform on the sphere orthogonal to (1, .., 1), around a random direction common to both:
    x = sqrt(share) direction + sqrt(1 - share) noise before normalisation, both of unit squared norm in the mean."""
    generator = torch.Generator().manual_seed(seed + 500_000_003)
    size = (3, 1, shape.num_heads, length, shape.head_dim)
    noise = torch.randn(size, generator=generator)
    direction = _unit(torch.randn(1, shape.num_heads, 1, shape.head_dim, generator=generator))
    share = torch.tensor(shares)[:, None, None, None]
    spread = ((1 - share) / (shape.head_dim - 1)).sqrt()
    q, k = (_unit(share.sqrt() * direction + spread * part) for part in noise[:2])
    return Inputs(q.to(device), k.to(device), noise[2].expand_as(q).to(device))


def _unit(x: Tensor) -> Tensor:
    x = x - x.mean(dim=-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True)


def _identity(v: Tensor) -> Tensor:
    """Values [B, H, L, L] whose attention output is the matrix of weights."""
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
    study.cell.num_features = timing.num_features
    for name, width in widths(study, "exp"):
        if width == study.estimators[name].get("width", timing.num_features):
            factory = instantiate(attention_node(study.estimators[name]))
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
            }
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
