"""Owns a run's identity: the hash of everything in its configuration that can change its result."""

import hashlib
import json
from typing import Any

from omegaconf import DictConfig, OmegaConf

_PARTS = ("task", "attention", "model", "protocol", "seed", "precision")
# where bytes lie and how many processes make them changes no number
_LOCAL = {"task": ("datasets", "num_workers")}


def identity_of(config: DictConfig) -> dict[str, Any]:
    """The resolved configuration without paths, tracking, device and other things that change no number."""
    resolved: dict[str, Any] = {}
    for part in _PARTS:
        node = config[part]
        value = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
        if isinstance(value, dict):
            value = {key: item for key, item in value.items() if key not in _LOCAL.get(part, ())}
        resolved[part] = value
    if config.get("compile") is not None:  # fused operations round differently
        resolved["compile"] = config.compile
    return resolved


def run_id_of(identity: dict[str, Any]) -> str:
    """Twelve hexadecimal digits; also the wandb id, so that a retried run stays one run."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
