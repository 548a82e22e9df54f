"""Owns recorded queries, keys and values: those of a model that is trained here, at every layer and head.

Legend: B batch, H heads, L length, D head_dim.
"""

import io
import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from data.base import Task
from lra.display import display, say
from lra.evaluation import evaluate
from lra.experiment import build_model
from lra.identity import identity_of, run_id_of
from lra.ledger import write_atomically
from lra.training import fit

_KEPT = 32  # examples, so that studies that need different numbers of them share one training


@dataclass(frozen=True)
class Head:
    """One head on one test example: its real tokens only, before any scaling. layer and head count from 1."""

    layer: int
    head: int
    example: int
    q: Tensor  # [L, D] float64
    k: Tensor
    v: Tensor

    @property
    def place(self) -> str:
        return f"layer {self.layer}, head {self.head}"


@dataclass(frozen=True)
class Recording:
    """`source` names the data set, the attention, and what the model had learned: for titles and notes."""

    run_id: str
    dataset: str
    attention: str
    steps: int
    test_accuracy: float
    heads: list[Head]

    @property
    def source(self) -> str:
        return (
            f"{self.attention} on {self.dataset}, {self.steps} steps, test accuracy {100 * self.test_accuracy:.1f} %, "
            f"run {self.run_id}"
        )


def record(config: DictConfig, num_examples: int, device: torch.device) -> Recording:
    """Train the run that task, attention, model, protocol and seed describe; record its first test examples.

    Kept in <paths.runs>/studies/recorded/ under the run's id, so that it is trained once for all studies.
    """
    run_id = run_id_of(identity_of(config))
    path = Path(config.paths.runs).expanduser() / "studies" / "recorded" / f"{run_id}.pt"
    if path.exists():
        recording = _read(path)
        if max(head.example for head in recording.heads) >= num_examples:
            say(f"queries and keys of run {run_id}: from {path}")
            return _first(recording, num_examples)
    recording = _train_and_record(config, run_id, max(num_examples, _KEPT), device)
    buffer = io.BytesIO()
    torch.save(asdict(recording), buffer)
    write_atomically(path, buffer.getvalue())
    return _first(recording, num_examples)


def _read(path: Path) -> Recording:
    try:
        stored = torch.load(path, weights_only=True)
        heads = [Head(**head) for head in stored.pop("heads")]
        return Recording(heads=heads, **stored)
    except (RuntimeError, EOFError, TypeError, KeyError, AttributeError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it: the model is then trained again") from error


def _first(recording: Recording, num_examples: int) -> Recording:
    return replace(recording, heads=[head for head in recording.heads if head.example <= num_examples])


def _train_and_record(config: DictConfig, run_id: str, num_examples: int, device: torch.device) -> Recording:
    task, protocol = instantiate(config.task), instantiate(config.protocol)
    model = build_model(config, task).to(device)
    manifest = task.prepare()
    title = f"training {config.names.attention} on {config.names.task} to record its queries and keys"
    say(f"{title}: {protocol.num_steps} steps")
    where: dict[str, Any] = {"device": device, "precision": config.precision}
    with display.run(title, protocol.num_steps) as bar:
        fitted = fit(
            model, task, protocol, seed=config.seed, checkpoint=None, identity=run_id,
            on_step=lambda step, loss: bar.update(step), **where,
        )  # fmt: skip
    model.load_state_dict(fitted.best_weights)
    counts = evaluate(model, task.batches("test", protocol.eval_batch_size), **where)
    heads = heads_of(model, task, num_examples, device)
    return Recording(run_id, manifest.dataset, str(config.names.attention), protocol.num_steps, counts.accuracy, heads)


@torch.no_grad()
def heads_of(model: nn.Module, task: Task, num_examples: int, device: torch.device) -> list[Head]:
    """What enters each attention slot for the first test examples, without padding. Of pairs, the first sequence."""
    calls: list[tuple[Any, ...]] = []
    slots = [block.attention.attention for block in model.encoder.blocks]
    hooks = [slot.register_forward_pre_hook(lambda _, inputs: calls.append(inputs)) for slot in slots]
    model.eval()
    batch = next(task.batches("test", num_examples)).to(device)
    model(batch.tokens, batch.key_padding_mask)
    for hook in hooks:
        hook.remove()
    assert len(calls) == len(slots), "each layer calls its slot once"
    sequences = batch.tokens.shape[1]
    return [
        _head(layer, head, example, inputs, example * sequences)
        for layer, inputs in enumerate(calls)
        for head in range(inputs[0].shape[1])
        for example in range(len(batch.labels))
    ]


def _head(layer: int, head: int, example: int, inputs: tuple[Any, ...], row: int) -> Head:
    mask = inputs[3]
    real = slice(None) if mask is None else ~mask[row]
    q, k, v = (x[row, head, real].double().cpu() for x in inputs[:3])  # [L, D]
    return Head(layer + 1, head + 1, example + 1, q, k, v)
