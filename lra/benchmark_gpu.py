"""Owns the benchmark of the fused op on a GPU: against PyTorch's fused exact attention, and against the memory's speed.

Legend: B batch, H heads, L length, D head_dim.
"""

import importlib.metadata
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from lra.benchmark_timing import Times, Work, figure, interleaved, ratio, timed
from lra.display import say
from lra.studies.mechanisms import Catalogue
from lra.tables import MISSING, Table

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# flash attention has no float32; PyTorch's other fused form has
_EXACT = {"bf16": SDPBackend.FLASH_ATTENTION, "fp32": SDPBackend.EFFICIENT_ATTENTION}
_NAMES = {"bf16": "flash attention", "fp32": "memory-efficient attention"}
_MOVED = {"forward": 4, "training": 8}  # q, k, v, out; and the gradients of all four

Call = Callable[..., Tensor]


@dataclass
class GpuLayers:
    """Subjects and inputs; `device` is a CPU in tests only."""

    config: DictConfig
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        self.settings, self.catalogue = self.config.gpu, Catalogue(instantiate(self.config.head_shape))
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.end = time.monotonic() + self.settings.seconds

    def batch_size(self, length: int) -> int:
        """As many tokens at every length: enough to fill a GPU at the shortest one."""
        return max(1, self.settings.tokens // length)

    def inputs(self, length: int, dtype: torch.dtype) -> list[Tensor]:
        """q, k, v [B, H, L, D] as views of [B, L, H, D], and a gradient of the output."""
        shape = (self.batch_size(length), length, self.settings.num_heads, self.settings.head_dim)
        generator = torch.Generator(self.device).manual_seed(self.seed)
        drawn = [torch.randn(shape, generator=generator, device=self.device, dtype=dtype) for _ in range(4)]
        views = [x.transpose(1, 2) for x in drawn]
        return [x.requires_grad_() for x in views[:3]] + views[3:]

    def calls(self, label: str, length: int) -> Call:
        """What is called with q, k and v [B, H, L, D]."""
        subject, settings = self.config.subjects[label], self.settings
        module = self.catalogue.build(
            subject.attention, list(subject.overrides), head_dim=settings.head_dim, num_heads=settings.num_heads,
            max_len=length, seed=self.seed,
        )  # fmt: skip
        return module.to(self.device)

    def cell(self, name: str, kind: str, length: int) -> dict[str, Times]:
        """Seconds of one call of each subject that runs. `kind`: forward or training (forward and backward)."""
        inputs, works, counts = self.inputs(length, _DTYPES[name]), {}, {}
        calls = {label: self.calls(label, length) for label in self.settings.subjects}
        for label, call in {"exact": functional.scaled_dot_product_attention, **calls}.items():
            work = _work(call, inputs, kind, _EXACT[name] if label == "exact" else None)
            try:
                works[label], counts[label] = self.repeated(work)
            except RuntimeError as error:  # OutOfMemoryError is one; flash attention is not built everywhere
                self.note(f"{label} {name} {kind} at L={length}: {str(error).splitlines()[0]}")
        times = interleaved(works, warmup=1, repetitions=self.settings.repetitions, device=self.device)
        return {label: _divided(taken, counts[label]) for label, taken in times.items()}

    def repeated(self, work: Work) -> tuple[Work, int]:
        """So many calls in a row that waiting for the last one, and starting the first, does not count."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()  # builds the kernels
        for warning in caught:
            self.note(str(warning.message))
        seconds, _ = timed(work, self.device)
        count = min(self.settings.most_calls, max(1, math.ceil(self.settings.seconds_per_repetition / seconds)))

        def several() -> None:
            for _ in range(count):
                work()

        return several, count

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def copy_speed(self) -> float:
        """Bytes per second, read and written, of a copy on the device."""
        source = torch.zeros(self.settings.copy_bytes, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        work, count = self.repeated(lambda: target.copy_(source))
        times = interleaved({"copy": work}, warmup=1, repetitions=self.settings.repetitions, device=self.device)
        return 2 * source.numel() / _divided(times["copy"], count).summary()["wall_median"]


def _work(call: Call, inputs: Sequence[Tensor], kind: str, backend: SDPBackend | None) -> Work:
    *qkv, gradient = inputs

    def forward() -> Tensor:
        if backend is None:
            return call(*qkv)
        with sdpa_kernel([backend]):
            return call(*qkv)

    @torch.no_grad()
    def inference() -> Tensor:
        return forward()

    def training() -> tuple[Tensor, ...]:
        return torch.autograd.grad(forward(), qkv, gradient)

    return {"forward": inference, "training": training}[kind]


def _divided(times: Times, count: int) -> Times:
    return Times(tuple(t / count for t in times.wall), tuple(t / count for t in times.cpu))


def measure_gpu(layers: GpuLayers) -> list[dict[str, Any]]:
    """The rows of the table of figures; every length's rows of the record stay in `layers.rows`."""
    if layers.device.type != "cuda":
        reach = layers.config.reach.gpu
        name = f"fused op on a GPU over flash attention at L={layers.settings.length}"
        return [figure(name, None, better="higher", reach=reach, note="not run: no GPU here")]
    return measure_cells(layers)


def measure_cells(layers: GpuLayers) -> list[dict[str, Any]]:
    settings, measured = layers.settings, {}
    speed = layers.copy_speed()
    layers.note(f"triton {_version('triton') or 'is not installed: the plain form ran'}")
    lengths = sorted(settings.lengths, key=lambda length: (length != settings.length, length))  # the figures' own first
    for length in lengths:
        for name in settings.dtypes:
            for kind in _MOVED:
                if time.monotonic() > layers.end:
                    layers.note(f"not run: {name} {kind} at L={length}, after {settings.seconds} s")
                    continue
                say(f"gpu: {name} {kind} at L={length}")
                try:
                    times = layers.cell(name, kind, length)
                except torch.OutOfMemoryError:
                    layers.note(f"out of memory: {name} {kind} at L={length}")
                    continue
                rows = _rows(times, name, kind, length, layers, speed)
                layers.rows += rows
                if length == settings.length:
                    measured[name, kind] = times, {row["subject"]: row["share_of_copy"] for row in rows}
    of_copy = figure("on a GPU, device copy, read and written", speed / 1e9, unit="GB/s", better="higher", reach=None,
                     note="; ".join(layers.notes))  # fmt: skip
    return [of_copy, *_figures(layers.config.reach, settings, measured)]


def _rows(
    times: Mapping[str, Times], name: str, kind: str, length: int, layers: GpuLayers, speed: float
) -> list[dict[str, Any]]:
    settings, batch_size = layers.settings, layers.batch_size(length)
    elements = batch_size * length * settings.num_heads * settings.head_dim
    moved = _MOVED[kind] * elements * _DTYPES[name].itemsize
    rows = []
    for label, taken in times.items():
        summary = taken.summary()
        achieved = moved / summary["wall_median"]
        rows.append(
            {"part": "gpu", "subject": label, "dtype": name, "pass": kind, "length": length, "batch_size": batch_size,
             "bytes": moved, "bytes_per_second": achieved, "share_of_copy": achieved / speed, **summary}
        )  # fmt: skip
    return rows


def _figures(
    reach: DictConfig, settings: DictConfig, measured: Mapping[tuple[str, str], tuple[Mapping[str, Times], Mapping]]
) -> list[dict[str, Any]]:  # fmt: skip
    figures, note = [], "not measured: see the note at the device copy"
    for name in settings.dtypes:
        for kind in _MOVED:
            times, shares = measured.get((name, kind), ({}, {}))
            for label in settings.subjects:
                place, both = f"on a GPU, {name} {kind} at L={settings.length}", "exact" in times and label in times
                figures.append(
                    figure(f"{place}, {_NAMES[name]} over {label}",
                           ratio(times["exact"], times[label]) if both else None, better="higher",
                           reach=reach.gpu if name == "bf16" else None, note="" if both else note)
                )  # fmt: skip
                if kind == "forward":
                    figures.append(
                        figure(f"{place}, {label}: share of the copy's bandwidth", shares.get(label), better="higher",
                               reach=reach.bandwidth, note="" if label in shares else note)
                    )  # fmt: skip
    return figures


def gpu_table(rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> Table:
    """One row per subject, type and pass: milliseconds, and the share of the copy's bandwidth, against the length."""
    cells: dict[str, dict[str, str]] = {}
    lengths = sorted({row["length"] for row in rows})
    for row in rows:
        cell = cells.setdefault(f"{row['subject']}, {row['dtype']} {row['pass']}", {})
        cell[f"ms {row['length']}"] = f"{1e3 * row['wall_median']:.3g}"
        cell[f"of copy {row['length']}"] = f"{row['share_of_copy']:.2f}"
    columns = [f"{kind} {length}" for kind in ("ms", "of copy") for length in lengths]
    table = pd.DataFrame.from_dict(cells, orient="index").reindex(columns=columns).fillna(MISSING)
    return Table("Benchmark: the fused op on a GPU", table, tuple(notes))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
