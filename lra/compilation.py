"""Owns torch.compile as an option of a run."""

import torch
from torch import nn

MODES = ("default", "reduce-overhead", "max-autotune")  # the second and third replay CUDA graphs on a GPU


def compiled(model: nn.Module, mode: str | None, backend: str = "inductor") -> nn.Module:
    """The same module, its calls through torch.compile unless `mode` is None; names of weights stay as they are. What was
    compiled before is forgotten: models of one class share a limit of 8 versions, and beyond it a call would quietly run
    uncompiled. Raises ValueError for an unknown mode."""
    if mode not in (None, *MODES):
        raise ValueError(f"compile={mode!r} is unknown; choose null, {', '.join(MODES)}")
    if mode is not None:
        torch.compiler.reset()
        model.compile(**({"mode": mode} if backend == "inductor" else {}), backend=backend)
    return model
