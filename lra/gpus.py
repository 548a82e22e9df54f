"""Owns which device a process computes on: one GPU each when several processes share a machine."""

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import torch

from lra.launching import shares_the_machine
from lra.ranks import Place

_held: dict[str, TextIO] = {}


def choose_device(name: str, place: Place = Place()) -> torch.device:
    """Ranks on one machine take one GPU each. Where an engine shows each of them a single GPU, that is its own."""
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f"unknown device={name!r}; choose auto, cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda was asked for, and torch finds no CUDA device; use device=cpu or device=auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if shares_the_machine():
        index = hold_one([str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())])
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    if place.size == 1:
        return torch.device("cuda")
    found = torch.cuda.device_count()
    if found > 1 and place.local_rank >= found:
        raise ValueError(
            f"local rank {place.local_rank} needs a GPU of its own, and torch finds {found}; give devices={found}"
        )
    device = torch.device("cuda", place.local_rank if found > 1 else 0)
    torch.cuda.set_device(device)
    return device


def hold_one(names: Sequence[str]) -> int:
    """The place in `names` (of GPUs, unique on this machine) of one that no other such process holds. The operating
    system gives it back when this process ends, however that happens."""
    folder = Path(tempfile.gettempdir()) / f"lra-gpus-{os.getuid()}"
    folder.mkdir(exist_ok=True, mode=0o700)
    for place, name in enumerate(names):
        if name in _held:
            return place
    for place, name in enumerate(names):
        file = open(folder / name, "a")  # noqa: SIM115 (held until the process ends)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _held[name] = file
        return place
    raise ValueError(
        f"all {len(names)} GPUs of this machine are held by other processes of this suite; "
        f"start at most {len(names)} at once: hydra.launcher.n_jobs={len(names)}"
    )
