"""Owns the benchmark of the training step: its time and memory against the length for the whole catalogue, and what
the loop adds to the bare step."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import nn
from torch.nn import functional

from data.base import Batch, Task
from lra.benchmark_timing import OutOfMemory, figure, interleaved, memory_limit, peak_memory, ratio, timed
from lra.display import say
from lra.experiment import build_model
from lra.grid import compose_cell
from lra.protocol import Protocol
from lra.seeding import derive_seed
from lra.training import TrainStep, build_optimizer

Step = Callable[[], object]


def attentions_of(chosen: Any) -> list[str]:
    """`all`, or a list of file names of conf/attention/."""
    known = list(GlobalHydra.instance().config_loader().get_group_options("attention"))
    if chosen == "all":
        return known
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(
            f"benchmark.scaling.attentions names {', '.join(unknown)}, which conf/attention/ does not hold; "
            f"choose `all` or a list from {', '.join(known)}"
        )
    return list(chosen)


def measure_scaling(config: DictConfig, device: torch.device) -> list[dict[str, Any]]:
    """One row per attention and length: train-step time and peak memory, or why there is none."""
    settings, rows = config.benchmark.scaling, []
    names = attentions_of(settings.attentions)
    ended: dict[str, str] = {}
    slowest: dict[str, tuple[int, float]] = {}
    for length in sorted(settings.lengths):
        steps: dict[str, Step] = {}
        cells = {name: {"part": "scaling", "subject": name, "pass": "train step", "length": length,
                        "batch_size": settings.batch_size} for name in names}  # fmt: skip
        for name in names:
            if name not in ended and name in slowest:
                shorter, seconds = slowest[name]
                predicted = seconds * (length / shorter) * (settings.repetitions + 2)
                if predicted > settings.seconds_per_cell:
                    ended[name] = f"not run: at least {predicted:.0f} s, more than benchmark.scaling.seconds_per_cell"
            if name in ended:
                cells[name]["status"] = ended[name]
                continue
            say(f"scaling: {name} at L={length}")
            try:
                with memory_limit(settings.memory_limit_gib, device):
                    step = _step(config, name, length, device)
                    slowest[name] = (length, timed(step, device)[0])
                    cells[name] |= {"status": "measured", "peak_memory_bytes": peak_memory(step, device)}
                steps[name] = step
            except OutOfMemory:
                ended[name] = cells[name]["status"] = "oom"
        times = interleaved(steps, warmup=0, repetitions=settings.repetitions, device=device)
        for name, taken in times.items():
            cells[name] |= taken.summary()
        rows += cells.values()
    return rows


def _step(config: DictConfig, name: str, length: int, device: torch.device) -> Step:
    """Forward, backward and optimiser of the backbone with this attention, on random tokens at every position."""
    facts, batch_size = config.benchmark.scaling.facts, config.benchmark.scaling.batch_size
    cell = compose_cell([f"attention={name}"])
    model: nn.Module = instantiate(config.model)(
        instantiate(cell.attention), seed=derive_seed(config.seed, "model"), max_len=length, **facts
    ).to(device)
    protocol: Protocol = instantiate(config.protocol)
    optimizer, _ = build_optimizer(model, protocol)
    step = TrainStep(model.train(), optimizer, None, protocol, device=device, precision=config.precision)
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "measure"))
    tokens = torch.randint(1, facts.vocab_size, (batch_size, facts.num_sequences, length), generator=generator)
    labels = torch.randint(0, facts.num_classes, (batch_size,), generator=generator)
    batch = Batch(tokens, None, labels).to(device)
    return lambda: step(batch)


def measure_loop(config: DictConfig, device: torch.device) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The loop's step (next batch, transfer, step, clip, schedule) against forward, backward and optimiser alone, on
    the same batch: rows and the figure."""
    task: Task = instantiate(config.task)
    task.prepare()
    protocol: Protocol = instantiate(config.protocol)
    settings = config.benchmark.loop
    batches = task.batches("train", protocol.batch_size, derive_seed(config.seed, "data_order"), pad_to_max_len=True)
    works = _loop_and_bare(config, task, protocol, batches, device)
    say(f"loop: {config.names.attention} on {config.names.task}")
    times = interleaved(works, warmup=settings.warmup, repetitions=settings.repetitions, device=device)
    shape = {"part": "loop", "pass": "train step", "length": task.max_len, "batch_size": protocol.batch_size}
    rows = [
        {**shape, "subject": f"{config.names.attention}, {name}", **taken.summary()} for name, taken in times.items()
    ]
    share = {key: 100 * (value - 1) for key, value in ratio(times["loop"], times["bare"]).items()}
    note = f"{config.names.attention}, {config.names.task}, batch {protocol.batch_size}"
    return rows, [figure("loop over the bare training step", share, better="lower", reach=config.benchmark.reach.loop,
                         unit="% added", note=note)]  # fmt: skip


def _loop_and_bare(
    config: DictConfig, task: Task, protocol: Protocol, batches: Iterator[Batch], device: torch.device
) -> dict[str, Step]:
    """Two models from the same weights; `bare` gets the batch that `loop` has just fetched."""
    models = [build_model(config, task).to(device).train() for _ in range(2)]
    optimizer, schedule = build_optimizer(models[0], protocol)
    step = TrainStep(models[0], optimizer, schedule, protocol, device=device, precision=config.precision)
    own_optimizer, _ = build_optimizer(models[1], protocol)
    held: list[Batch] = []
    losses: list[torch.Tensor] = []

    def loop() -> None:
        batch = next(batches).to(device)
        losses.append(step(batch))
        held[:] = [batch]

    def bare() -> None:
        (batch,) = held
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=config.precision == "bf16"):
            logits = models[1](batch.tokens, batch.key_padding_mask)
        functional.cross_entropy(logits.float(), batch.labels).backward()
        own_optimizer.step()
        own_optimizer.zero_grad(set_to_none=True)

    return {"loop": loop, "bare": bare}
