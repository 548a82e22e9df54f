"""Owns which code a configuration may name: `_target_` reaches this project's own classes and functions alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

ROOMS = ("attention", "models", "data", "lra")
_ROOT = Path(__file__).resolve().parents[1]


def refuse_foreign_targets(config: DictConfig) -> None:
    """Raises ValueError naming the node and what it asks for, before anything is imported or built. A configuration file
    from elsewhere could otherwise run any function of any installed package. `allow_foreign_targets=true` permits it."""
    if config.allow_foreign_targets:
        return
    for node, target in _targets(OmegaConf.to_container(config, resolve=False), ""):
        if "${" in target:
            target = str(OmegaConf.select(config, node))
        if not is_ours(target):
            raise ValueError(
                f"{node}={target}: this is no class or function of {', '.join(f'`{room}`' for room in ROOMS)}, and a "
                "configuration may name nothing else. If you trust it, add allow_foreign_targets=true."
            )


def is_ours(target: str) -> bool:
    """Whether `room.module.Name` is defined in that very file: `lra.provenance.subprocess.run` is not ours."""
    module, _, name = target.rpartition(".")
    if module.split(".")[0] not in ROOMS or not re.fullmatch(r"[\w.]+", target):
        return False
    file = _ROOT / (module.replace(".", "/") + ".py")
    return file.is_file() and re.search(rf"^(class|def) {name}\b", file.read_text(), re.M) is not None


def _targets(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            inner = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield inner, str(value)
            yield from _targets(value, inner)
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from _targets(value, f"{path}[{place}]")
