"""Owns what all tests share: explicit threads, no wandb account, and a small real task that learns in seconds."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "offline"
for secret in ("WANDB_API_KEY", "LRA_RUNS", "LRA_DATASETS"):
    os.environ.pop(secret, None)

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.base import Manifest, Missing, Task
from data.encoded import encode

ROOT = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)


class CountingTask(Task):
    """Which of two token ids is in the majority? Variable lengths; solvable by mean pooling, so a fit must succeed."""

    name, num_classes = "counting", 2

    def __init__(self, *, num_train: int = 256, num_test: int = 67, max_len: int = 24, num_sequences: int = 1) -> None:
        super().__init__(source="generated", vocab_size=8, max_len=max_len, datasets="unused")
        self.num_sequences = num_sequences
        self._sizes = {"train": num_train, "val": 65, "test": num_test}

    def check(self) -> list[Missing]:
        return []

    def _prepare(self):
        splits = {}
        for place, (split, size) in enumerate(self._sizes.items()):
            draw = np.random.Generator(np.random.PCG64(place))
            lengths = draw.integers(3, self.max_len, size * self.num_sequences) | 1
            sequences = [draw.integers(1, 3, length) for length in lengths]
            labels = [int((sequences[i * self.num_sequences] == 2).mean() > 0.5) for i in range(size)]
            splits[split] = encode(sequences, labels, self.num_sequences)
        digests = {split: data.sha256() for split, data in splits.items()}
        return Manifest("counting", "counting", "generated", False, self._sizes, digests), splits


@pytest.fixture
def counting_task() -> CountingTask:
    return CountingTask()


@pytest.fixture
def run_cli(tmp_path):
    """Run `python run.py ...` in a process of its own, with results and data under tmp_path."""

    def run(*arguments: str, timeout: float = 240, environment: dict[str, str] | None = None):
        settings = {
            **os.environ,
            "LRA_RUNS": str(tmp_path / "runs"),
            "LRA_DATASETS": str(tmp_path / "datasets"),
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        return subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            env=settings,
            stdin=subprocess.DEVNULL,
        )

    return run
