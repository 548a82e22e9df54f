"""Owns the count of right answers over batches: exact, example by example, nothing dropped."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from data.base import Batch


@dataclass(frozen=True)
class Counts:
    """`loss` is the mean cross-entropy per example; `right` tells for each example in order whether it was right."""

    correct: int
    total: int
    loss: float
    right: torch.Tensor  # bool [total]

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[Batch], *, device: torch.device, precision: str) -> Counts:
    """Run `batches` through the model in evaluation mode; the mode it was in is restored."""
    was_training = model.training
    model.eval()
    right, loss = [], torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(batch.tokens, batch.key_padding_mask).float()
        loss += functional.cross_entropy(logits, batch.labels, reduction="sum").double()
        right.append(logits.argmax(dim=-1) == batch.labels)
    model.train(was_training)
    if not right:
        raise ValueError("nothing to evaluate: the split is empty")
    all_right = torch.cat(right).cpu()
    total = len(all_right)
    return Counts(int(all_right.sum()), total, float(loss) / total, all_right)
