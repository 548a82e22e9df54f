"""Owns made-up records for tests of tables and reports: the shape of real ones, numbers from a seed."""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lra.ledger import Ledger
from lra.records import RunRecord

TASKS = ("listops", "text", "retrieval", "image", "pathfinder")


def make_record(
    task: str = "listops",
    attention: str = "softmax",
    seed: int = 0,
    *,
    right: np.ndarray | None = None,
    total: int = 200,
    accuracy: float = 0.4,
    protocol: str = "quick",
    source: str = "generated",
    stand_in: bool = False,
    status: str = "finished",
    overrides: Sequence[str] = (),
    identity: dict | None = None,
    speed: float = 100.0,
    length: int = 128,
    experiment: str | None = "quick",
    gpu: str | None = None,
    points: int = 5,
) -> RunRecord:
    """`right`: which test examples were right; otherwise drawn with probability `accuracy`, by seed and attention."""
    if right is None:
        draw = np.random.Generator(np.random.PCG64([seed, *attention.encode(), *task.encode()]))
        right = draw.random(total) < accuracy
    correct, total = int(right.sum()), len(right)
    best = {
        "accuracy": correct / total, "correct": correct, "total": total, "loss": 1.0,
        "right": base64.b64encode(np.packbits(right).tobytes()).decode(),
    }  # fmt: skip
    measured = {"examples_per_second": speed + seed, "steps_per_second": speed / 4, "peak_memory_bytes": 3 * 2**20}
    known = {
        "task": {"source": source, "max_len": length}, "attention": {"_target_": attention}, "seed": seed,
        "protocol": {"name": protocol, "num_steps": 10 * points}, "model": {"dim": 64}, "precision": "fp32",
    }  # fmt: skip
    for part, value in (identity or {}).items():
        known[part] = {**known[part], **value} if isinstance(value, dict) else value
    done = status == "finished"
    run_id = hashlib.sha256(json.dumps([task, known, list(overrides)], sort_keys=True).encode()).hexdigest()[:12]
    hardware = {"cpu": "CPU", "threads": 2} | ({"gpu": gpu} if gpu else {})
    return RunRecord(
        run_id=run_id, status=status, experiment=experiment, task=task, attention=attention, protocol=protocol, seed=seed,
        overrides=list(overrides), identity=known,
        data={
            "stand_in": stand_in, "dataset": f"{task}-made-up", "source": source,
            "sha256": {"test": hashlib.sha256(f"{task}{source}{total}".encode()).hexdigest()},
        },
        result={
            "test_best": best, "test_final": best, "val_best_accuracy": 0.5, "steps": 10 * points,
            "majority_accuracy": 0.17, "train_curve": [[10 * i, 2.0 / (i + 1)] for i in range(1, points + 1)],
            "val_curve": [[10 * i, 0.1 * i / points, 1.0] for i in range(1, points + 1)],
        } if done else {},
        efficiency={
            "train_step": measured, "inference": measured, "parameters": 7, "attention_parameters": 0, "length": length,
            "batch_size": 4, "num_sequences": 1,
        } if done else {},
        provenance={
            "commit": "0123456789abcdef", "hardware": hardware, "seconds": {"fit": 1.0}, "started_at": "2026-01-01T00:00:00",
        },
        error=None if done else f"made up: {status}",
    )  # fmt: skip


def make_ledger(
    runs: Path,
    attentions: Sequence[str],
    seeds: Sequence[int] = (0, 1, 2),
    tasks: Sequence[str] = TASKS,
    points: int = 5,
) -> list[RunRecord]:
    """A whole grid, each attention a little better and slower than the one before."""
    records = [
        make_record(
            task, attention, seed, accuracy=0.3 + 0.4 * place / len(attentions), speed=500 / (1 + place), points=points,
            length=128 * (1 + TASKS.index(task)), stand_in=task == "text", source="embedded" if task == "text" else "generated",
        )
        for task in tasks for place, attention in enumerate(attentions) for seed in seeds
    ]  # fmt: skip
    for record in records:
        Ledger(runs).write(record)
    return records
