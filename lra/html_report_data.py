"""Owns what the HTML report knows: run folders in, plain lists and numbers out. No mark-up, no drawing."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lra.html_report_entries import Entry, Gathered, Row, column_key, command_of, setting_of, shown, source_of
from lra.published import Paper, beside
from lra.records import RunRecord
from lra.statistics import Ranks, Summary, holm, mean_ranks, paired, summarise

CURVE_POINTS = 300_000  # of all curves together; more runs, fewer points each
CURVE_MOST, CURVE_LEAST = 120, 12
ALL = ""  # of an experiment or a hardware: no filter


class Report:
    """The whole content. Everything is sorted, and nothing depends on the clock: the same records, the same content."""

    def __init__(self, gathered: Gathered, papers: Sequence[Paper]) -> None:
        self.gathered, self.entries, self.papers = gathered, gathered.entries, papers
        self.columns = sorted({entry.column for entry in self.entries}, key=column_key)
        self.parts: dict[str, list[Any]] = {}
        self._places: dict[str, dict[str, int]] = {}

    def content(self) -> dict[str, Any]:
        runs = self._runs()
        return {
            "folders": [shown(folder) for folder in self.gathered.folders],
            "damaged": self.gathered.damaged,
            "columns": [self._column(name) for name in self.columns],
            "runs": runs,
            "parts": self.parts,
            "sheets": self._sheets(),
            "papers": [self._paper(paper) for paper in self.papers],
            "comparisons": self._comparisons(),
            "lengths": self._lengths(),
        }

    def _column(self, name: str) -> dict[str, Any]:
        held = [entry.record for entry in self.entries if entry.column == name]
        known = [record for record in held if record.data]
        majority = sorted({round(100 * r.result["majority_accuracy"], 2) for r in held if r.status == "finished"})
        return {
            "name": name,
            "task": held[0].task,
            "source": source_of(known[0]) if known else "unknown",
            "standIn": any(record.data.get("stand_in") for record in known),
            "majority": majority,
        }

    def _runs(self) -> list[dict[str, Any]]:
        finished = sum(entry.record.status == "finished" for entry in self.entries)
        points = max(CURVE_LEAST, min(CURVE_MOST, CURVE_POINTS // max(1, 2 * finished)))
        return [self._run(entry, points) for entry in self.entries]

    def _run(self, entry: Entry, points: int) -> dict[str, Any]:
        record = entry.record
        run: dict[str, Any] = {
            "id": record.run_id, "path": entry.path, "column": entry.column, "task": record.task, "row": list(entry.row),
            "seed": record.seed, "status": record.status, "experiment": record.experiment or "",
            "hardware": entry.hardware, "commit": record.provenance.get("commit") or "unknown",
            "started": record.provenance.get("started_at", ""), "command": command_of(record), "error": record.error or "",
            "test": record.data.get("sha256", {}).get("test", ""),
            "config": {part: self._shared(part, value) for part, value in sorted(record.identity.items())},
        }  # fmt: skip
        if record.status == "finished":
            best, cost = record.result["test_best"], record.efficiency
            run |= {
                "accuracy": _short(100 * best["accuracy"], 6), "correct": best["correct"], "total": best["total"],
                "final": _short(100 * record.result["test_final"]["accuracy"], 6), "steps": record.result["steps"],
                "speed": _short(cost["train_step"]["examples_per_second"]), "parameters": cost["parameters"],
                "memory": _short(cost["train_step"]["peak_memory_bytes"] / 2**20), "length": cost["length"],
                "loss": thin(record.result.get("train_curve", []), points),
                "validation": thin([entry[:2] for entry in record.result.get("val_curve", [])], points),
            }  # fmt: skip
        return run

    def _shared(self, part: str, value: Any) -> int:
        """Configurations repeat: each distinct part is stored once, and a run holds its place in the list."""
        places, text = self._places.setdefault(part, {}), json.dumps(value, sort_keys=True)
        if text not in places:
            places[text] = len(places)
            self.parts.setdefault(part, []).append(flat(value, part))
        return places[text]

    def _sheets(self) -> dict[str, dict[str, Any]]:
        """The accuracy table once for every choice of experiment and hardware, each from its own runs."""
        groups: dict[tuple[str, str], list[int]] = defaultdict(list)
        for place, entry in enumerate(self.entries):
            for experiment in {ALL, entry.record.experiment or ALL}:
                for hardware in (ALL, entry.hardware):
                    groups[experiment, hardware].append(place)
        return {
            f"{experiment}|{hardware}": self._sheet(groups[experiment, hardware])
            for experiment, hardware in sorted(groups)
        }

    def _sheet(self, places: Sequence[int]) -> dict[str, Any]:
        cells: dict[Row, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        for place in places:
            cells[self.entries[place].row][self.entries[place].column].append(place)
        rows = [
            {
                "row": list(row),
                "cells": {name: self._cell(cells[row][name]) for name in self.columns if name in cells[row]},
            }
            for row in sorted(cells)
        ]
        return {"rows": rows, "ranks": self._ranks(rows)}

    def _cell(self, places: Sequence[int]) -> dict[str, Any]:
        """One seed counts once, wherever else it was run too."""
        by_seed: dict[int, RunRecord] = {}
        for place in places:
            record = self.entries[place].record
            if record.status == "finished":
                by_seed.setdefault(record.seed, record)
        lost = {self.entries[place].record.seed: self.entries[place].record.status for place in places}
        lost = {seed: status for seed, status in lost.items() if seed not in by_seed}
        cell: dict[str, Any] = {"runs": list(places), "lost": sorted(set(lost.values())), "lostCount": len(lost)}
        if by_seed:
            accuracies = [100 * by_seed[seed].result["test_best"]["accuracy"] for seed in sorted(by_seed)]
            cell |= {"seeds": sorted(by_seed), **_rounded(summarise(accuracies))}
        return cell

    def _ranks(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Per protocol, precision and settings."""
        groups: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
        for row in rows:
            means = {name: cell["mean"] for name, cell in row["cells"].items() if "mean" in cell}
            if means:
                groups[setting_of(row["row"])][row["row"][0]] = means
        found: dict[str, Any] = {}
        for setting, accuracies in groups.items():
            try:
                found[setting] = _ranks_content(mean_ranks(accuracies))
            except ValueError as error:
                found[setting] = {"why": str(error)}
        return found

    def _paper(self, paper: Paper) -> dict[str, Any]:
        """Published rows per setting, because what makes them differ depends on how ours were run."""
        held: dict[str, dict[str, list[RunRecord]]] = defaultdict(lambda: defaultdict(list))
        attentions: dict[str, set[str]] = defaultdict(set)
        for entry in self.entries:
            attentions[setting_of(entry.row)].add(entry.row[0])
            if entry.record.data:
                held[setting_of(entry.row)][entry.column].append(entry.record)
        footnotes: dict[str, str] = {}
        rows = {}
        for setting in sorted(attentions):
            columns = {name: (records[0].task, records) for name, records in sorted(held[setting].items())}
            rows[setting] = beside(paper, "accuracy", sorted(attentions[setting]), columns, footnotes).rows
        return {
            "key": paper.key, "name": paper.name, "title": paper.title, "rows": rows,
            "footnotes": {letter: text for text, letter in footnotes.items()},
        }  # fmt: skip

    def _comparisons(self) -> list[dict[str, Any]]:
        """Every attention against softmax (or the first one), on the same seeds and examples; Holm over all of a
        setting's comparisons."""
        groups: dict[str, dict[str, dict[str, dict[int, RunRecord]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(dict))
        )
        for entry in self.entries:
            if entry.record.status == "finished":
                cell = groups[setting_of(entry.row)][entry.column][entry.row[0]]
                cell.setdefault(entry.record.seed, entry.record)
        found = []
        for setting in sorted(groups):
            rows = [
                row for column in self.columns for row in _against_reference(setting, column, groups[setting][column])
            ]
            for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
                found.append({**row, "holm": _short(corrected), "p": _short(row["p"])})
        return found

    def _lengths(self) -> list[dict[str, Any]]:
        """Cost at each length that was measured: the median over the runs of one shape on one machine."""
        groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
        for entry in self.entries:
            cost = entry.record.efficiency
            if entry.record.status == "finished":
                shape = (cost["length"], cost["batch_size"], cost.get("num_sequences", 1))
                groups[(entry.row[0], entry.row[2], entry.hardware, entry.record.task, *shape)].append(cost)
        rows = [_length_row(key, groups[key]) for key in sorted(groups)]
        return rows + [_benchmark_row(row) for row in self.gathered.scaling]


def _against_reference(setting: str, column: str, cells: Mapping[str, Mapping[int, RunRecord]]) -> list[dict[str, Any]]:
    reference = "softmax" if "softmax" in cells else min(cells, default="")
    rows = []
    for attention in sorted(set(cells) - {reference}):
        try:
            test = paired(cells[attention], cells[reference])
        except ValueError:
            continue  # other seeds or other test examples: nothing is paired, and no row claims it
        rows.append(
            {
                "setting": setting, "column": column, "attention": attention, "reference": reference,
                "seeds": list(test.seeds), "difference": _short(100 * test.difference), "low": _short(100 * test.low),
                "high": _short(100 * test.high), "onlyA": test.only_a, "onlyB": test.only_b, "p": test.p_value,
                "method": test.method,
            }
        )  # fmt: skip
    return rows


def _length_row(key: tuple[Any, ...], costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    attention, precision, hardware, task, length, batch, sequences = key
    train, inference = (sorted(c[part]["examples_per_second"] for c in costs) for part in ("train_step", "inference"))
    memory = sorted(c["train_step"]["peak_memory_bytes"] for c in costs)
    middle, tokens = len(costs) // 2, length * sequences
    return {
        "attention": attention, "precision": precision, "hardware": hardware, "task": task, "length": length,
        "batch": batch, "runs": len(costs), "train": _short(train[middle] * tokens),
        "inference": _short(inference[middle] * tokens), "memory": _short(memory[middle] / 2**20 / (batch * sequences)),
    }  # fmt: skip


def _benchmark_row(row: Mapping[str, Any]) -> dict[str, Any]:
    length, batch = row["length"], row["batch_size"]
    return {
        "attention": row["subject"], "precision": row["precision"], "hardware": row["hardware"], "task": "benchmark",
        "length": length, "batch": batch, "runs": 1, "train": _short(batch * length / row["wall_median"]),
        "inference": None, "memory": _short(row["peak_memory_bytes"] / 2**20 / batch),
    }  # fmt: skip


def thin(curve: Sequence[Sequence[float]], most: int) -> list[list[float]]:
    """At most `most` points at even distance, first and last among them."""
    if len(curve) > most:
        curve = [curve[round(place * (len(curve) - 1) / (most - 1))] for place in range(most)]
    return [[entry[0], _short(entry[1])] for entry in curve]


def flat(value: Any, prefix: str) -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"prefix.a.b": 1}; lists stay whole."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: item for name in sorted(value) for key, item in flat(value[name], f"{prefix}.{name}").items()}


def _ranks_content(ranks: Ranks) -> dict[str, Any]:
    return {
        "tasks": list(ranks.tasks), "mean": {name: _short(value) for name, value in ranks.mean.items()},
        "friedman": _short(ranks.friedman_p), "critical": _short(ranks.critical_difference),
        "leftOut": list(ranks.left_out),
    }  # fmt: skip


def _rounded(summary: Summary) -> dict[str, Any]:
    values = {"n": summary.n, "mean": _short(summary.mean, 6)}
    if summary.std is not None and summary.low is not None and summary.high is not None:
        values |= {"std": _short(summary.std), "low": _short(summary.low, 6), "high": _short(summary.high, 6)}
    return values


def _short(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
