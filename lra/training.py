"""Owns the fit: steps, schedule, validation, best model, checkpoint and exact resume."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from data.base import Batch, Task
from lra.checkpoint import load_checkpoint, save_checkpoint
from lra.distributed import ALONE, World
from lra.evaluation import Counts, evaluate
from lra.protocol import Protocol
from lra.seeding import derive_seed
from lra.stopping import Stop


class Diverged(RuntimeError):
    """The loss stopped being a number."""


@dataclass
class Progress:
    """All that a fit knows besides weights and optimiser. Plain numbers, so that it fits into a checkpoint."""

    step: int = 0
    best_step: int = -1
    best_accuracy: float = -1.0
    train_curve: list[tuple[int, float]] = field(default_factory=list)  # (step, mean loss since the last entry)
    val_curve: list[tuple[int, float, float]] = field(default_factory=list)  # (step, accuracy, loss)
    examples_seen: int = 0


@dataclass
class Fit:
    """What `fit` hands back: the model holds the final weights, `best_weights` those of the best validation."""

    progress: Progress
    best_weights: dict[str, Tensor]
    first_step: int  # above 0 where a checkpoint was gone on from


def build_optimizer(
    model: nn.Module, protocol: Protocol
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    """AdamW and a linear one-cycle: from peak/25 up to the peak at step warmup-1, down to peak/250,000 at the end."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=protocol.learning_rate,
        betas=tuple(protocol.betas),
        eps=protocol.eps,
        weight_decay=protocol.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=protocol.learning_rate,
        total_steps=protocol.num_steps,
        pct_start=protocol.warmup_steps / protocol.num_steps,
        anneal_strategy="linear",
        cycle_momentum=protocol.cycle_momentum,
    )
    return optimizer, schedule


class TrainStep:
    """One optimiser step on one batch. Also what `lra.efficiency` times, so that the two are the same thing."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler | None,
        protocol: Protocol,
        *,
        device: torch.device,
        precision: str,
        world: World = ALONE,
    ) -> None:
        """Of several ranks (`world`) each is given the whole batch and computes on its share."""
        self.world = world
        self.model, self.optimizer, self.schedule, self.protocol = model, optimizer, schedule, protocol
        self.device, self.precision = device, precision
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def __call__(self, batch: Batch) -> Tensor:
        """The batch's mean loss, detached and still on the device: reading it every step would stall a GPU."""
        total = torch.zeros((), device=self.device)
        size = len(batch.labels)
        for part in _split(self.world.share(batch), self.protocol.micro_batches):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
                logits = self.model(part.tokens, part.key_padding_mask)
            loss = functional.cross_entropy(logits.float(), part.labels) / (size / len(part.labels))
            loss.backward()
            total += loss.detach()
        self.world.add_up([total, *(p.grad for p in self.parameters if p.grad is not None)])
        if self.protocol.gradient_clip == "value":
            nn.utils.clip_grad_value_(self.parameters, self.protocol.gradient_clip_limit)
        elif self.protocol.gradient_clip == "norm":
            nn.utils.clip_grad_norm_(self.parameters, self.protocol.gradient_clip_limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.schedule is not None:
            self.schedule.step()
        return total


class TrainingState:
    """All that changes while a fit goes on. What `save` writes is all that `restore` needs, at the end of any step."""

    def __init__(self, model: nn.Module, protocol: Protocol, device: torch.device) -> None:
        self.model, self.device = model, device
        self.optimizer, self.schedule = build_optimizer(model, protocol)
        self.progress = Progress()
        self.best_weights: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []  # since the last entry of the training curve

    def save(self, path: Path, identity: str) -> None:
        schedule = self.schedule.state_dict().items()
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": {k: v for k, v in schedule if not callable(v) and not k.startswith("_anneal")},
            "progress": vars(self.progress),
            "losses": self.losses,
            "best_weights": self.best_weights,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        save_checkpoint(path, state, identity)

    def restore(self, path: Path, identity: str) -> None:
        state = load_checkpoint(path, identity, self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all([value.cpu() for value in state["cuda_rng"]])
        self.progress = Progress(**state["progress"])
        self.losses, self.best_weights = state["losses"], state["best_weights"]


def fit(
    model: nn.Module,
    task: Task,
    protocol: Protocol,
    *,
    seed: int,
    device: torch.device,
    precision: str,
    checkpoint: Path | None,
    identity: str,
    world: World = ALONE,
    stop: Stop = Stop(),
    on_step: Callable[[int, float | None], None] = lambda step, loss: None,
    on_validation: Callable[[int, Counts], None] = lambda step, counts: None,
) -> Fit:
    """Train to the end of the protocol. With `checkpoint`, go on where that file left off: on one CPU the result is
    bit-identical to an uninterrupted run. Raises Diverged on a loss that is not finite, and Stopped, with a fresh
    checkpoint, at the end of the step or validation batch in which `stop` was asked for. Of several ranks (`world`)
    rank 0 validates, writes and calls back; the others step with it, and hand back no curve and no best weights."""
    state = TrainingState(model, protocol, device)
    step_once = TrainStep(
        model, state.optimizer, state.schedule, protocol, device=device, precision=precision, world=world
    )
    torch.manual_seed(derive_seed(seed, "dropout"))

    def save() -> None:
        if checkpoint is not None and world.leads:
            state.save(checkpoint, identity)

    if checkpoint is not None and checkpoint.exists():
        state.restore(checkpoint, identity)
    progress, first_step = state.progress, state.progress.step
    world.compare({"checkpoint of step": first_step}, "paths.runs must be one folder that all nodes share")
    batches = task.batches(
        "train",
        protocol.batch_size,
        derive_seed(seed, "data_order"),
        start=progress.step,
        pad_to_max_len=protocol.pad_to_max_len,
        length_bucketing=protocol.length_bucketing,
    )
    model.train()
    while True:
        if _validation_is_due(protocol, progress):
            if world.leads:
                validation = stop.between(_validation(task, protocol, seed, progress), save)
                counts = evaluate(model, validation, device=device, precision=precision)
                _keep_best(state, protocol, counts)
                on_validation(progress.step, counts)
                save()
            world.follow()
        elif progress.step % protocol.checkpoint_every == 0 and progress.step:
            save()
        world.heed(stop, save)
        if progress.step == protocol.num_steps:
            return Fit(progress, state.best_weights or _copy_weights(model), first_step)
        if not world.leads:  # rank 0's stream is in the checkpoint; this one needs no place there
            torch.manual_seed(derive_seed(seed, "dropout", f"rank {world.rank} step {progress.step}"))
        loss = step_once(next(batches).to(device))
        progress.step += 1
        progress.examples_seen += protocol.batch_size
        if world.leads:
            state.losses.append(loss)
            on_step(progress.step, _log(state, protocol))


def _validation_is_due(protocol: Protocol, progress: Progress) -> bool:
    """False also right after a restart from a checkpoint that was written after this step's validation."""
    if progress.val_curve and progress.val_curve[-1][0] == progress.step:
        return False
    return progress.step == protocol.num_steps or (progress.step > 0 and progress.step % protocol.eval_every == 0)


def _log(state: TrainingState, protocol: Protocol) -> float | None:
    """The mean loss since the last entry of the curve, where one is due."""
    step = state.progress.step
    if step % protocol.log_every and step % protocol.eval_every and step != protocol.num_steps:
        return None
    mean = _mean_loss(state.losses, state.progress)
    state.losses = []
    return mean


def _mean_loss(losses: list[Tensor], progress: Progress) -> float:
    values = torch.stack(losses)
    mean = float(values.mean())
    if not math.isfinite(mean):
        first = progress.step - len(losses) + 1 + int((~torch.isfinite(values)).nonzero()[0])
        raise Diverged(f"the training loss is {float(values[~torch.isfinite(values)][0])} at step {first}")
    progress.train_curve.append((progress.step, mean))
    return mean


def _validation(task: Task, protocol: Protocol, seed: int, progress: Progress) -> Iterator[Batch]:
    if protocol.validation_batches is None:
        return task.batches("val", protocol.eval_batch_size, pad_to_max_len=protocol.pad_to_max_len)
    # Published quirk (Skyformer main.py:280): each validation goes on in an endless shuffled stream.
    window = len(progress.val_curve) * protocol.validation_batches
    stream = task.batches(
        "val", protocol.batch_size, derive_seed(seed, "validation_order"), window, protocol.pad_to_max_len
    )
    return (next(stream) for _ in range(protocol.validation_batches))


def _keep_best(state: TrainingState, protocol: Protocol, counts: Counts) -> None:
    progress = state.progress
    progress.val_curve.append((progress.step, counts.accuracy, counts.loss))
    if counts.accuracy <= progress.best_accuracy:
        return
    progress.best_accuracy = counts.accuracy
    if progress.step < protocol.best_after_fraction * protocol.num_steps:
        return  # published quirk (Skyformer main.py:156-160): the best so far is noted and not kept
    progress.best_step = progress.step
    state.best_weights = _copy_weights(state.model)


def _copy_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def _split(batch: Batch, parts: int) -> list[Batch]:
    if parts == 1:
        return [batch]
    masks = [None] * parts if batch.key_padding_mask is None else batch.key_padding_mask.chunk(parts)
    return [Batch(*part) for part in zip(batch.tokens.chunk(parts), masks, batch.labels.chunk(parts), strict=True)]
