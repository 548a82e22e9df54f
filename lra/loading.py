"""Owns the cost of loading: how much of a training step goes into getting its batch."""

from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import nn

from data.base import Task
from lra.efficiency import synchronize
from lra.protocol import Protocol
from lra.seeding import derive_seed
from lra.training import TrainStep, build_optimizer


def loading_cost(
    model: nn.Module,
    task: Task,
    protocol: Protocol,
    *,
    seed: int,
    device: torch.device,
    precision: str,
    batch_size: int,
    repetitions: int,
) -> dict[str, Any]:
    """Seconds to assemble a batch and bring it to the device, and seconds of the step on that very batch, in turn;
    medians after one step of warm-up. Trains `model`."""
    optimizer, _ = build_optimizer(model, protocol)
    step = TrainStep(model, optimizer, None, protocol, device=device, precision=precision)
    batches = task.batches("train", batch_size, derive_seed(seed, "data_order"), pad_to_max_len=protocol.pad_to_max_len)
    model.train()
    loading, stepping = [], []
    for _ in range(1 + repetitions):
        started = perf_counter()
        batch = next(batches).to(device)
        synchronize(device)
        loaded = perf_counter()
        step(batch)
        synchronize(device)
        loading.append(loaded - started)
        stepping.append(perf_counter() - loaded)
    load, train = median(loading[1:]), median(stepping[1:])
    return {
        "batch_size": batch_size,
        "repetitions": repetitions,
        "load_seconds": load,
        "step_seconds": train,
        "share": load / (load + train),
    }
