"""Owns the benchmark of the slot alone: forward, training, crossover, memory and the floor that matrix products set.

Legend: B batch, H heads, L length, D head_dim.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from lra.benchmark_timing import Times, figure, interleaved, peak_memory, ratio
from lra.display import say
from lra.studies.mechanisms import Catalogue


@dataclass
class Layers:
    """The mechanisms under comparison, and inputs in the memory layout that the backbone hands over."""

    config: DictConfig
    device: torch.device
    seed: int

    def __post_init__(self) -> None:
        self.catalogue = Catalogue(instantiate(self.config.head_shape))
        self.rows: list[dict[str, Any]] = []

    def build(self, label: str, length: int, seed: int | None = None) -> nn.Module:
        subject = self.config.subjects[label]
        layer = self.config.layer
        module = self.catalogue.build(
            subject.attention, list(subject.overrides), head_dim=layer.head_dim, num_heads=layer.num_heads,
            max_len=length, seed=self.seed if seed is None else seed,
        )  # fmt: skip
        return module.to(self.device)

    def inputs(self, length: int, batch_size: int) -> list[Tensor]:
        """q, k, v [B, H, L, D] as views of [B, L, H, D], and a gradient of the output."""
        layer, generator = self.config.layer, torch.Generator().manual_seed(self.seed)
        shape = (batch_size, length, layer.num_heads, layer.head_dim)
        drawn = [torch.randn(shape, generator=generator).to(self.device).transpose(1, 2) for _ in range(4)]
        return [x.requires_grad_() for x in drawn[:3]] + drawn[3:]

    def compare(self, labels: Sequence[str], length: int, kind: str) -> dict[str, Times]:
        """`kind`: forward, or training (forward and backward to q, k and v)."""
        layer = self.config.layer
        inputs = self.inputs(length, layer.batch_size)
        works = {label: _work(self.build(label, length), inputs, kind) for label in labels}
        say(f"layer: {kind} of {', '.join(labels)} at L={length}")
        times = interleaved(works, warmup=layer.warmup, repetitions=layer.repetitions, device=self.device)
        shape = {"part": "layer", "pass": kind, "length": length, "batch_size": layer.batch_size}
        self.rows += [{**shape, "subject": label, **taken.summary()} for label, taken in times.items()]
        return times


def _work(module: nn.Module, inputs: Sequence[Tensor], kind: str) -> Callable[[], object]:
    *qkv, gradient = inputs

    @torch.no_grad()
    def forward() -> Tensor:
        return module(*qkv)

    def training() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(*qkv), [*qkv, *module.parameters()], gradient, allow_unused=True)

    return {"forward": forward, "training": training}[kind]


def measure_layer(layers: Layers) -> list[dict[str, Any]]:
    """The rows of the table of figures that need the slot alone."""
    length, reach = layers.config.layer.length, layers.config.reach
    forward = layers.compare(list(layers.config.subjects), length, "forward")
    training = layers.compare(["softmax", "schoenbat"], length, "training")
    figures = [
        figure(f"forward at L={length}, softmax over schoenbat", ratio(forward["softmax"], forward["schoenbat"]),
               better="higher", reach=reach.forward),
        figure(f"training at L={length}, softmax over schoenbat", ratio(training["softmax"], training["schoenbat"]),
               better="higher", reach=reach.training),
        figure(f"forward at L={length}, exact kernelized over schoenbat",
               ratio(forward["kernelized"], forward["schoenbat"]), better="higher", reach=reach.kernelized),
        figure(f"forward at L={length}, schoenbat_as_published (causal, this suite's) over schoenbat",
               ratio(forward["as_published"], forward["schoenbat"]), better="higher", reach=None),
        figure(f"forward at L={length}, schoenbat_plus over schoenbat", ratio(forward["plus"], forward["schoenbat"]),
               better="lower", reach=reach.plus),
    ]  # fmt: skip
    return [*figures, *_crossovers(layers), *_errors(layers), _memory(layers), _floor(layers)]


def _crossovers(layers: Layers) -> list[dict[str, Any]]:
    """The shortest length of the list from which on schoenbat is the faster one."""
    figures = []
    for kind in ("forward", "training"):
        best = None
        for length in sorted(layers.config.layer.crossover, reverse=True):
            times = layers.compare(["softmax", "schoenbat"], length, kind)
            if ratio(times["softmax"], times["schoenbat"])["value"] < 1:
                break
            best = length
        note = "" if best else f"softmax is faster at every L up to {max(layers.config.layer.crossover)}"
        name = f"shortest L at which schoenbat beats softmax, {kind}"
        figures.append(figure(name, best, better="lower", reach=layers.config.reach.crossover, unit="L", note=note))
    return figures


@torch.no_grad()
def _errors(layers: Layers) -> list[dict[str, Any]]:
    """Output error against the exact twin, relative to the output's deviation from the plain mean of v."""
    settings, errors = layers.config.error, {}
    *qkv, _ = layers.inputs(settings.length, settings.batch_size)
    exact = layers.build("kernelized", settings.length)(*qkv)
    signal = (exact - qkv[2].mean(dim=2, keepdim=True)).square().mean().sqrt()
    for label in ("schoenbat", "plus"):
        drawn = [layers.build(label, settings.length, layers.seed + i)(*qkv) - exact for i in range(settings.draws)]
        errors[label] = float((torch.stack(drawn).square().mean().sqrt() / signal).item())
    note = f"relative output error {errors['plus']:.3g} against {errors['schoenbat']:.3g}, {settings.draws} draws"
    share = errors["plus"] / errors["schoenbat"]
    return [figure("estimator error, schoenbat_plus over schoenbat", share, better="lower", reach=1.0, note=note)]


def _memory(layers: Layers) -> dict[str, Any]:
    settings = layers.config.memory
    peaks = {}
    for length in (settings.length // 2, settings.length):
        module, inputs = layers.build("schoenbat", length), layers.inputs(length, settings.batch_size)
        work = _work(module, inputs, "forward")
        work()
        peaks[length] = peak_memory(work, layers.device)
        layers.rows.append({"part": "layer", "pass": "forward", "subject": "schoenbat", "length": length,
                            "batch_size": settings.batch_size, "peak_memory_bytes": peaks[length]})  # fmt: skip
    half, whole = peaks.values()
    return figure(
        f"extra memory of a schoenbat forward at L={settings.length}, B={settings.batch_size}", whole / 1e6, unit="MB",
        better="lower", reach=layers.config.reach.memory, note=f"{whole / half:.2f} times that of half the length",
    )  # fmt: skip


def _floor(layers: Layers) -> dict[str, Any]:
    """Against the two products that project q and k, at the number of projections that the fast form needs."""
    layer = layers.config.layer
    module, inputs = layers.build("schoenbat", layer.length), layers.inputs(layer.length, layer.batch_size)
    columns = next(part.num_projections for part in module.modules() if hasattr(part, "num_projections"))
    matrix = torch.randn(layer.num_heads, columns, layer.head_dim, device=layers.device)
    tokens = [x.detach().transpose(2, 3).contiguous() for x in inputs[:2]]  # [B, H, D, L]
    pieces = [piece.contiguous() for x in tokens for row in x for piece in row.split(layer.floor_block, dim=2)]
    outputs = {p.shape[2]: p.new_empty(layer.num_heads, columns, p.shape[2]) for p in pieces}

    @torch.no_grad()
    def products() -> None:
        for piece in pieces:
            torch.bmm(matrix, piece, out=outputs[piece.shape[2]])

    works = {"schoenbat": _work(module, inputs, "forward"), "products": products}
    times = interleaved(works, warmup=layer.warmup, repetitions=layer.repetitions, device=layers.device)
    layers.rows.append({"part": "layer", "pass": "forward", "subject": "projection products", "length": layer.length,
                        "batch_size": layer.batch_size, **times["products"].summary()})  # fmt: skip
    return figure(
        "schoenbat forward over its two projection products", ratio(times["schoenbat"], times["products"]),
        better="lower", reach=layers.config.reach.floor, note=f"{columns} projections, blocks of {layer.floor_block}",
    )  # fmt: skip
