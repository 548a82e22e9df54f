"""Owns the cells of a grid: which run each of them is. Composing 450 configurations takes half a minute, so what they
come to is kept beside the ledger, under a hash of the configuration files."""

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import DictConfig, open_dict

from lra.identity import identity_of, run_id_of
from lra.ledger import write_atomically

# how, where and by whom a run is done; none of it is part of a run's identity
_ELSEWHERE = (
    "hydra", "job", "tracking", "paths", "device", "devices", "num_nodes", "threads", "data_workers", "resident", "rerun",
    "budget_minutes", "allow_foreign_targets", "report", "curate",
)  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run of a grid. `overrides` is what makes it this run and no other."""

    overrides: tuple[str, ...]
    task: str
    attention: str
    protocol: str
    seed: int
    run_id: str

    @property
    def title(self) -> str:
        return f"{self.task} / {self.attention} / seed {self.seed}"


def cells_of(cells: Sequence[Sequence[str]], runs: str | Path) -> list[Cell]:
    """The cells that these override lists mean, in order."""
    store = Path(runs).expanduser() / "cells" / f"{_digest_of_configuration()}.json"
    known: dict[str, dict] = {}
    with suppress(OSError, ValueError):
        known = json.loads(store.read_text())
    before, composed, found = len(known), {}, []
    for typed in cells:
        overrides = [item for item in typed if re.split("[=./]", item.lstrip("+~"))[0] not in _ELSEWHERE]
        key = json.dumps(overrides)
        if key not in known:
            known[key] = _compose(tuple(overrides), composed)
        found.append(Cell(**{**known[key], "overrides": tuple(overrides)}))
    if len(known) > before:
        with suppress(OSError):  # a convenience: a folder that cannot be written has its own message elsewhere
            write_atomically(store, json.dumps(known).encode())
    return found


def _compose(overrides: tuple[str, ...], composed: dict[tuple[str, ...], DictConfig]) -> dict:
    """Cells that differ in a plain seed only are composed once: everything that depends on it is resolved later."""
    from lra.grid import compose_cell

    seeds = [item for item in overrides if item.startswith("seed=") and item[5:].isdigit()]
    rest = tuple(item for item in overrides if item not in seeds)
    if rest not in composed:
        composed[rest] = compose_cell(list(rest))
    config = composed[rest]
    if seeds:
        with open_dict(config):
            config.seed = int(seeds[-1][5:])
    names = config.names
    cell = Cell(overrides, names.task, names.attention, names.protocol, config.seed, run_id_of(identity_of(config)))
    return asdict(cell)


def _digest_of_configuration() -> str:
    """Over every file that composing reads, and the code that turns a configuration into an identity."""
    from lra.grid import search_path

    digest = hashlib.sha256(Path(run_id_of.__code__.co_filename).read_bytes())
    for folder in search_path():
        for path in sorted(folder.rglob("*.yaml")):
            digest.update(f"{path.relative_to(folder)}\0{path.read_text()}\0".encode())
    return digest.hexdigest()[:16]
