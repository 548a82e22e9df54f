"""Owns which GPU a process computes on when several processes share a machine: each holds one, for as long as it lives."""

import fcntl
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

_held: dict[str, TextIO] = {}


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
