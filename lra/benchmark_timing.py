"""Owns how the benchmark takes a number: interleaved repetitions, medians and quartiles, paired ratios, peak memory."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lra.allocator import give_back_freed_memory
from lra.efficiency import peak_cpu_memory, synchronize

Work = Callable[[], object]


@dataclass(frozen=True)
class Times:
    """Seconds of each repetition; `cpu` is the processor time of all threads, which a busy machine disturbs less."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    def summary(self) -> dict[str, float]:
        low, median, high = np.quantile(self.wall, (0.25, 0.5, 0.75)).tolist()
        return {
            "wall_median": median,
            "wall_q25": low,
            "wall_q75": high,
            "cpu_median": float(np.median(self.cpu)),
            "cpu_least": min(self.cpu),
            "repetitions": len(self.wall),
        }


def interleaved(works: Mapping[str, Work], *, warmup: int, repetitions: int, device: torch.device) -> dict[str, Times]:
    """All works in turn, again and again: what disturbs the machine disturbs them alike."""
    for _ in range(warmup):
        for work in works.values():
            work()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in works}
    for _ in range(repetitions):
        for name, work in works.items():
            taken[name].append(timed(work, device))
    return {name: Times(*zip(*pairs, strict=True)) for name, pairs in taken.items()}


def timed(work: Work, device: torch.device) -> tuple[float, float]:
    """Wall and processor seconds of one call."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    synchronize(device)
    return time.perf_counter() - wall, time.process_time() - cpu


def ratio(slow: Times, fast: Times) -> dict[str, float]:
    """Quartiles of slow/fast over repetitions that ran side by side; by processor time the ratio of the least."""
    low, median, high = np.quantile(np.divide(slow.wall, fast.wall), (0.25, 0.5, 0.75)).tolist()
    return {"value": median, "q25": low, "q75": high, "by_cpu_time": min(slow.cpu) / min(fast.cpu)}


def peak_memory(work: Work, device: torch.device) -> int:
    """Most bytes that `work` holds at once beyond what was held before it."""
    if device.type != "cuda":
        return peak_cpu_memory(work)
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class OutOfMemory(RuntimeError):
    """The work needs more than the benchmark's limit, or than the machine has."""


@contextmanager
def memory_limit(gib: float, device: torch.device) -> Iterator[None]:
    """Raise OutOfMemory where the work asks for more; on Linux a process would be killed otherwise. A GPU's own size
    is its limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limited = sys.platform.startswith("linux") and device.type == "cpu"
    if limited:
        give_back_freed_memory()
        resource.setrlimit(resource.RLIMIT_AS, (_address_space() + int(gib * 2**30), hard))
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutOfMemory(str(error)) from None
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise OutOfMemory(str(error).splitlines()[0]) from None
    finally:
        if limited:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _address_space() -> int:
    """Bytes of address space in use now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def exponent(lengths: Sequence[int], values: Sequence[float]) -> float | None:
    """Slope of log value over log length, least squares; None below two points."""
    if len(lengths) < 2:
        return None
    return float(np.polyfit(np.log(lengths), np.log(values), 1)[0])


def figure(
    name: str,
    measured: Mapping[str, float] | float | None,
    *,
    better: str,
    reach: float | None,
    unit: str = "x",
    note: str = "",
) -> dict[str, Any]:
    """One row of the table of figures; `measured` None: not run, and `note` says why."""
    row = {"figure": name, "unit": unit, "better": better, "reach": reach, "note": note, "value": None, "q25": None,
           "q75": None, "by_cpu_time": None}  # fmt: skip
    if measured is not None:
        row |= dict(measured) if isinstance(measured, Mapping) else {"value": float(measured)}
    value = row["value"]
    row["reached"] = None
    if value is not None and reach is not None:
        row["reached"] = value >= reach if better == "higher" else value <= reach
    return row
