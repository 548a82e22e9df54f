"""Owns Protocol: optimiser, schedule, steps and batch of one paper, typed. The numbers live in conf/protocol/."""

from dataclasses import dataclass, fields
from typing import Literal

_KINDS = {int: (int,), float: (float, int), bool: (bool,), int | None: (int, type(None))}
_CLIPS = ("value", "norm", "none")


@dataclass(frozen=True)
class Protocol:
    """Built from conf/protocol/<name>.yaml; every field is stated there."""

    name: str
    batch_size: int
    num_steps: int
    learning_rate: float  # the peak
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    cycle_momentum: bool  # published quirk: OneCycle moves beta1 0.95 -> 0.85 -> 0.95
    gradient_clip: Literal["value", "norm", "none"]
    gradient_clip_limit: float
    micro_batches: int  # a batch is split into this many parts, their losses averaged; the same for every attention
    eval_every: int
    eval_batch_size: int
    validation_batches: int | None  # None: the whole split; a number: published quirk, a moving window of batches
    best_after_fraction: float  # published quirk: a best model is kept only after this share of the steps
    pad_to_max_len: bool
    length_bucketing: bool  # training batches of similar lengths; the same for every attention
    log_every: int
    checkpoint_every: int
    measure_warmup: int
    measure_repetitions: int
    measure_batch_size: int

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            kinds = _KINDS.get(item.type)  # type: ignore[arg-type]
            if kinds and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
                raise ValueError(
                    f"protocol.{item.name}={value!r} must be of type {getattr(item.type, '__name__', item.type)}"
                )
        if self.gradient_clip not in _CLIPS:
            raise ValueError(f"unknown protocol.gradient_clip={self.gradient_clip!r}; choose {', '.join(_CLIPS)}")
        if not 2 <= self.warmup_steps < self.num_steps:
            raise ValueError(
                f"protocol.warmup_steps={self.warmup_steps} must be at least 2 and "
                f"below protocol.num_steps={self.num_steps}"
            )
        if self.batch_size % self.micro_batches:
            raise ValueError(
                f"protocol.batch_size={self.batch_size} is not divisible by protocol.micro_batches={self.micro_batches}"
            )
        for name in ("batch_size", "eval_every", "eval_batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"protocol.{name}={getattr(self, name)} must be at least 1")
