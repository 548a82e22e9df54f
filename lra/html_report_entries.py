"""Owns how the HTML report reads run folders: each record with its file, its column, its row, and its command."""

import hashlib
import json
import shlex
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lra.ledger import Ledger
from lra.records import RunRecord
from lra.tables import TASK_ORDER, settings_of
from lra.tracking import hardware_name

_ROOT = Path(__file__).resolve().parents[1]
Row = tuple[str, str, str, str]  # attention, protocol, precision, settings


@dataclass(frozen=True)
class Entry:
    """A record, the file that holds it, and where it stands in the report."""

    record: RunRecord
    path: str
    folder: str
    column: str
    row: Row

    @property
    def hardware(self) -> str:
        return hardware_name(self.record)


@dataclass(frozen=True)
class Gathered:
    entries: list[Entry]
    damaged: list[str]
    folders: list[str]
    scaling: list[dict[str, Any]]  # job=benchmark's training steps at each length


def gather(folders: Sequence[Path]) -> Gathered:
    """Every record below the folders (each laid out as a runs folder), and a line per file that cannot be read."""
    found: list[tuple[RunRecord, Path, Path]] = []
    damaged: list[str] = []
    scaling: list[dict[str, Any]] = []
    for folder in folders:
        ledger = Ledger(folder)
        records, unreadable = ledger.read_all()
        damaged += unreadable
        scaling += _scaling(folder / "benchmark", damaged)
        found += [(record, ledger.path(record.run_id), folder) for record in records]
    rows = _rows([record for record, _, _ in found])
    entries = [
        Entry(record, shown(str(path)), str(folder), column_of(record), row)
        for (record, path, folder), row in zip(found, rows, strict=True)
    ]
    entries.sort(key=lambda entry: (column_key(entry.column), entry.row, entry.record.seed, entry.path))
    return Gathered(entries, [shown(line) for line in damaged], [str(folder) for folder in folders], scaling)


def _scaling(folder: Path, damaged: list[str]) -> list[dict[str, Any]]:
    """The measured rows of every benchmark record in the folder, each with its hardware and precision."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text())
            hardware = record["occasion"]["hardware"]
            place = hardware.get("gpu") or f"{hardware['cpu']}, {record['threads']['torch']} threads"
            known = {"hardware": place, "precision": record["precision"]}
            rows += [
                {key: row[key] for key in ("subject", "length", "batch_size", "wall_median", "peak_memory_bytes")}
                | known
                for row in record["rows"]
                if row["part"] == "scaling" and row["status"] == "measured"
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(f"{path}: no benchmark record ({error!r})")
    return rows


def shown(text: str) -> str:
    """Paths below the checkout are shown from there on, so that the report does not depend on where that lies."""
    return text.replace(f"{_ROOT}/", "")


def column_of(record: RunRecord) -> str:
    """A task's column is one data source: official and self-generated data never share a mean."""
    if not record.data:
        return record.task
    return record.dataset if record.data.get("stand_in") else f"{record.task} ({record.data['source']})"


def _rows(records: Sequence[RunRecord]) -> list[Row]:
    """Attention, protocol, precision and other overrides. Where these agree and the configurations still differ (a
    YAML file was changed between two runs), a piece of the configuration's hash keeps them apart."""
    plain = [(r.label, r.protocol, str(r.identity.get("precision", "")), settings_of(r)) for r in records]
    digests = [_digest({key: value for key, value in r.identity.items() if key != "seed"}) for r in records]
    variants = defaultdict(set)
    for record, row, digest in zip(records, plain, digests, strict=True):
        variants[row, column_of(record)].add(digest)
    return [
        row if len(variants[row, column_of(record)]) == 1 else (*row[:3], f"{row[3]} configuration {digest}".strip())
        for record, row, digest in zip(records, plain, digests, strict=True)
    ]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:6]


def command_of(record: RunRecord) -> str:
    """What runs this very cell again."""
    experiment = [f"experiment={record.experiment}"] if record.experiment else []
    cell = [
        f"task={record.task}",
        f"attention={record.attention}",
        f"protocol={record.protocol}",
        f"seed={record.seed}",
    ]
    return shlex.join(["python", "run.py", *experiment, *cell, *record.overrides, "rerun=true"])


def setting_of(row: Sequence[str]) -> str:
    return " · ".join(part for part in row[1:] if part)


def source_of(record: RunRecord) -> str:
    return f"stand-in ({record.data['source']})" if record.data.get("stand_in") else str(record.data["source"])


def column_key(name: str) -> tuple[int, str]:
    task = name.split(" (")[0]
    return (TASK_ORDER.index(task) if task in TASK_ORDER else len(TASK_ORDER), name)
