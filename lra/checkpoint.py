"""Owns the checkpoint file: written atomically, read without unpickling code, refused when it is of another run."""

import io
from pathlib import Path
from typing import Any

import torch

from lra.ledger import write_atomically


def save_checkpoint(path: Path, state: dict[str, Any], identity: str) -> None:
    buffer = io.BytesIO()
    torch.save({"identity": identity, **state}, buffer)
    write_atomically(path, buffer.getvalue())


def load_checkpoint(path: Path, identity: str, device: torch.device) -> dict[str, Any]:
    """Raises ValueError with the path and advice when the file is damaged or belongs to another configuration."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        found = str(state.pop("identity"))
    except Exception as error:
        raise ValueError(
            f"{path}: the checkpoint cannot be read ({type(error).__name__}). Delete it to start this run afresh."
        ) from error
    if found != identity:
        raise ValueError(
            f"{path}: the checkpoint belongs to run {found}, not to {identity}. Delete it to start this run afresh."
        )
    return state
