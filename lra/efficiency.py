"""Owns the cost of a run, measured in a pass of its own: time of a training step and of inference, memory, size."""

import copy
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from data.base import Batch, Task
from lra.compilation import compiled
from lra.protocol import Protocol
from lra.seeding import derive_seed
from lra.training import TrainStep, build_optimizer

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler announces itself on stderr otherwise


def measure(
    model: nn.Module,
    task: Task,
    protocol: Protocol,
    *,
    seed: int,
    device: torch.device,
    precision: str,
    compile_mode: str | None = None,
) -> dict[str, Any]:
    """Full-length batches (every position real, so that no mechanism profits from padding), warm-up, synchronised
    timing. Works on a copy: the model that was evaluated stays as it was. Times in seconds, memory in bytes."""
    batch = full_length_batch(task, protocol.measure_batch_size, derive_seed(seed, "measure")).to(device)
    twin = compiled(copy.deepcopy(model), compile_mode)  # a copy is not compiled
    optimizer, _ = build_optimizer(twin, protocol)
    step = TrainStep(twin, optimizer, None, protocol, device=device, precision=precision)
    twin.train()
    train_times = _times(lambda: step(batch), protocol, device)
    train_memory = _peak_memory(lambda: step(batch), device)
    twin.eval()
    infer = _inference(twin, batch, precision)
    inference_times = _times(infer, protocol, device)
    inference_memory = _peak_memory(infer, device)
    return {
        "batch_size": protocol.measure_batch_size,
        "length": task.max_len,
        "num_sequences": task.num_sequences,
        "train_step": _summary(train_times, protocol.measure_batch_size) | {"peak_memory_bytes": train_memory},
        "inference": _summary(inference_times, protocol.measure_batch_size) | {"peak_memory_bytes": inference_memory},
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention_parameters": sum(p.numel() for p in _slot_tensors(model, "parameters")),
        "attention_buffers": sum(b.numel() for b in _slot_tensors(model, "buffers")),
    }


def full_length_batch(task: Task, batch_size: int, seed: int) -> Batch:
    """Random token ids at every position up to max_len."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, task.num_sequences, task.max_len)
    tokens = torch.randint(1, task.vocab_size, shape, generator=generator)
    labels = torch.randint(0, task.num_classes, (batch_size,), generator=generator)
    return Batch(tokens, None, labels)


def _slot_tensors(model: nn.Module, kind: str) -> list[torch.Tensor]:
    blocks = model.encoder.blocks  # type: ignore[union-attr]
    return [tensor for block in blocks for tensor in getattr(block.attention.attention, kind)()]


def _inference(model: nn.Module, batch: Batch, precision: str) -> Callable[[], object]:
    @torch.no_grad()
    def infer() -> object:
        with torch.autocast(batch.tokens.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            return model(batch.tokens, batch.key_padding_mask)

    return infer


def _times(work: Callable[[], object], protocol: Protocol, device: torch.device) -> list[float]:
    for _ in range(protocol.measure_warmup):
        work()
    times = []
    for _ in range(protocol.measure_repetitions):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _summary(times: list[float], batch_size: int) -> dict[str, float]:
    q25, median, q75 = (
        torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    )
    return {
        "seconds_q25": q25,
        "seconds_median": median,
        "seconds_q75": q75,
        "repetitions": len(times),
        "steps_per_second": 1 / median,
        "examples_per_second": batch_size / median,
    }


def _peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that `work` holds at once beyond what was held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    return peak_cpu_memory(work)


def peak_cpu_memory(work: Callable[[], object]) -> int:
    """Peak of the bytes handed out by torch's CPU allocator while `work` runs, from the profiler's allocation events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    held = peak = 0
    stack = list(profiler.profiler.kineto_results.experimental_event_tree())
    sizes = []
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    for _, size in sorted(sizes, key=lambda item: item[0]):
        held += size
        peak = max(peak, held)
    return peak
