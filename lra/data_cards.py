"""Owns the facts of a data card: what is known of one prepared source, as plain values for a template."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from omegaconf import DictConfig, OmegaConf

from data.base import SPLITS, Manifest, Task
from data.encoded import EncodedSplit
from lra.grid import search_path

Setting = tuple[str, str, str]  # key, value, comment


def card_of(task: Task, config: DictConfig, manifest: Manifest, shown: bool, floors: pd.DataFrame) -> dict[str, Any]:
    """`shown`: whether contents may go into the card. `floors`: of this data set, possibly none."""
    job = config.job
    splits = {split: task.split(split) for split in SPLITS}
    return {
        "name": f"{manifest.dataset}-{manifest.source}",
        "task": config.names.task,
        "manifest": manifest.as_dict(),
        "details": _plain(manifest.details),
        "num_classes": task.num_classes,
        "num_sequences": task.num_sequences,
        "max_len": task.max_len,
        "image_side": task.image_side,
        "shown": shown,
        "settings": settings_of(config.task, _comments(config.names.task)),
        "lengths": {split: _quantiles(data) for split, data in splits.items()},
        "labels": {split: _balance(data, task.num_classes) for split, data in splits.items()},
        "samples": list(_samples(task, job.samples, job.sample_characters)) if shown else [],
        "floors": floors.to_dict("records"),
    }


def settings_of(node: Any, comments: Mapping[str, str], prefix: str = "") -> list[Setting]:
    """Every key of a task's configuration with its value and what the file says about it."""
    rows: list[Setting] = []
    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    for key, value in values.items():
        if key in ("_target_", "datasets", "num_workers"):
            continue
        path = f"{prefix}{key}"
        if isinstance(value, dict):
            rows += settings_of(value, comments, f"{path}.")
        else:
            rows.append((path, "null" if value is None else str(value), comments.get(path, "")))
    return rows


def _comments(task: str) -> dict[str, str]:
    """{path of key: comment} of conf/task/<task>.yaml."""
    files = (folder / "task" / f"{task}.yaml" for folder in search_path())
    return comments_of(next(path for path in files if path.is_file()).read_text())


def comments_of(text: str) -> dict[str, str]:
    found, parents = {}, []
    for line in text.splitlines():
        match = re.match(r"( *)([\w-]+):(?:.*?\s#\s*(.*))?", line)
        if match:
            depth = len(match.group(1)) // 2
            parents = [*parents[:depth], match.group(2)]
            found[".".join(parents)] = match.group(3) or ""
    return found


def _quantiles(data: EncodedSplit) -> dict[str, float]:
    lengths = data.lengths()
    cuts = np.quantile(lengths, [0, 0.05, 0.5, 0.95, 1])
    names = ("shortest", "5 %", "median", "95 %", "longest")
    return {"mean": float(lengths.mean())} | dict(zip(names, cuts.tolist(), strict=True))


def _balance(data: EncodedSplit, num_classes: int) -> list[float]:
    return (np.bincount(data.labels, minlength=num_classes) / len(data)).tolist()


def _samples(task: Task, count: int, characters: int) -> Iterator[dict[str, Any]]:
    """The shortest of the first 200 test examples, so that one can be read whole, then the first ones."""
    data = task.split("test")
    if task.image_side is not None:
        return
    shortest = int(data.lengths()[:200].sum(axis=1).argmin())
    for row in list(dict.fromkeys([shortest, *range(count)]))[: min(count, len(data))]:
        place = row * data.num_sequences
        parts = []
        for number in range(data.num_sequences):
            first, last = data.offsets[place + number : place + number + 2]
            facts = task.describe(data.tokens[first:last])
            text = facts.pop("text")
            parts.append({"text": _cut(text, characters), "length": int(last - first), "facts": facts})
        yield {"row": row, "label": int(data.labels[row]), "parts": parts}


def _cut(text: str, characters: int) -> str:
    return text if len(text) <= characters else f"{text[:characters]} […]"


def _plain(details: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested details as lines; the configuration's parameters are among the settings already."""
    rows: list[tuple[str, str]] = []
    for key, value in details.items():
        if key == "parameters":
            continue
        if isinstance(value, Mapping):
            rows += [(f"{key}.{name}", text) for name, text in _plain(value)]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            rows.append((key, ", ".join(map(str, value))))
        else:
            rows.append((key, str(value)))
    return rows


def table_of(cards: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """One row per data set: what the other files say, for a program to read."""
    rows = []
    for card in cards:
        manifest = card["manifest"]
        row = {key: manifest[key] for key in ("task", "dataset", "source", "stand_in")} | {"max_len": card["max_len"]}
        for split in SPLITS:
            row |= {f"{split}_examples": manifest["counts"][split], f"{split}_sha256": manifest["sha256"][split]}
            row |= {f"{split}_mean_length": round(card["lengths"][split]["mean"], 2)}
            row |= {f"{split}_majority": round(max(card["labels"][split]), 5)}
        rows.append(row | {f"loading_{key}": value for key, value in (card.get("loading") or {}).items()})
    return pd.DataFrame(rows)
