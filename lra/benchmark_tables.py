"""Owns what the benchmark's record is rendered as: the table of figures, the paper's table of steps and memory, and the
log-log figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lra.benchmark_timing import exponent
from lra.figures import _COLOURS, _MARKERS
from lra.tables import MISSING, Table

Rows = Sequence[Mapping[str, Any]]


def figures_table(figures: Rows, notes: Sequence[str]) -> Table:
    """One row per figure: the median ratio, its quartiles, what it should reach."""
    cells = {}
    for row in figures:
        spread = f"{row['q25']:.3g} to {row['q75']:.3g}" if row["q25"] is not None else MISSING
        sign = {"higher": "≥", "lower": "≤"}[row["better"]]
        cells[row["figure"]] = {
            "measured": MISSING if row["value"] is None else f"{row['value']:.3g} {row['unit']}",
            "quartiles": spread,
            "by CPU time": MISSING if row["by_cpu_time"] is None else f"{row['by_cpu_time']:.3g}",
            "reach": MISSING if row["reach"] is None else f"{sign} {row['reach']:g}",
            "reached": {True: "yes", False: "no", None: MISSING}[row["reached"]],
            "note": row["note"],
        }
    return Table("Benchmark: figures", pd.DataFrame.from_dict(cells, orient="index"), tuple(notes))


def time_of(device: str) -> str:
    """What exponents are fitted to: on a CPU processor time, which other programs disturb least."""
    return "cpu_least" if device == "cpu" else "wall_median"


def scaling_table(rows: Rows, notes: Sequence[str], time_key: str) -> Table:
    """The layout of the LRA paper's table 2 (arXiv 2011.04006): steps per second and peak memory against the length."""
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cell = cells.setdefault(row["subject"], {})
        length = _short(row["length"])
        if row["status"] == "measured":
            cell[f"steps/s {length}"] = f"{1 / row['wall_median']:.3g}"
            cell[f"GB {length}"] = f"{row['peak_memory_bytes'] / 1e9:.3g}"
        else:
            cell[f"steps/s {length}"] = cell[f"GB {length}"] = "OOM" if row["status"] == "oom" else MISSING
    for name, cell in cells.items():
        for label, key in (("time ~ L^", time_key), ("memory ~ L^", "peak_memory_bytes")):
            slope = exponent(*_curve(rows, name, key))
            cell[label] = MISSING if slope is None else f"{slope:.2f}"
    lengths = [_short(length) for length in sorted({row["length"] for row in rows})]
    columns = [f"{kind} {length}" for kind in ("steps/s", "GB") for length in lengths] + ["time ~ L^", "memory ~ L^"]
    frame = pd.DataFrame.from_dict(cells, orient="index", columns=columns)
    return Table("Training step against sequence length", frame, tuple(notes))


def scaling_figure(rows: Rows, shown: Sequence[str], time_key: str) -> Figure:
    """Two log-log panels, time and peak memory; the legend states the fitted exponents."""
    figure, panels = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
    seconds = {"cpu_least": "processor seconds of a training step", "wall_median": "seconds of a training step"}
    titles = {time_key: seconds[time_key], "peak_memory_bytes": "peak memory of a training step (bytes)"}
    for panel, (key, title) in zip(panels, titles.items(), strict=True):
        for place, name in enumerate(shown):
            lengths, values = _curve(rows, name, key)
            if not lengths:
                continue
            slope = exponent(lengths, values)
            panel.plot(
                lengths, values, marker=_MARKERS[place % len(_MARKERS)], color=_COLOURS[place % len(_COLOURS)],
                markersize=6, linewidth=1.3, label=name + ("" if slope is None else f": L^{slope:.2f}"),
            )  # fmt: skip
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.xaxis.set_major_locator(FixedLocator(sorted({row["length"] for row in rows})))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(int(value))))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("sequence length")
        panel.set_title(title, fontsize=10)
        panel.grid(color="0.9")
        panel.legend(fontsize=7.5, frameon=False)
    return figure


def regressions(new: Mapping[str, Any], old: Mapping[str, Any], tolerance: float) -> tuple[Table, list[str]]:
    """Figure by figure; a regression is worse by more than `tolerance` and outside of the quartiles of the other."""
    known = {row["figure"]: row for row in old["figures"]}
    cells, worse = {}, []
    for row in new["figures"]:
        before = known.get(row["figure"])
        if before is None or before["value"] is None or row["value"] is None:
            continue
        sign = 1 if row["better"] == "lower" else -1
        change = (row["value"] - before["value"]) / abs(before["value"]) if before["value"] else 0.0
        near, far = ("q25", "q75") if sign > 0 else ("q75", "q25")
        apart = row[near] is None or before[far] is None or sign * (row[near] - before[far]) > 0
        regressed = sign * change > tolerance and apart
        cells[row["figure"]] = {
            "before": f"{before['value']:.3g}", "now": f"{row['value']:.3g}", "change": f"{100 * change:+.1f} %",
            "verdict": "worse" if regressed else "as before or better",
        }  # fmt: skip
        if regressed:
            worse.append(row["figure"])
    frame = pd.DataFrame.from_dict(cells, orient="index")
    note = f"worse: by more than {100 * tolerance:g} %, and the quartiles do not overlap"
    return Table(f"{new['name']} against {old['name']}", frame, (note, *_differences(new, old))), worse


def _differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What else is not the same, so that nobody takes another machine for a regression."""
    facts = {"hardware": ("occasion", "hardware"), "software": ("occasion", "software"), "settings": ("settings",)}
    found = []
    for label, path in facts.items():
        a, b = new, old
        for key in path:
            a, b = a[key], b[key]
        if a != b:
            found.append(f"the two records differ in {label}")
    return found


def _curve(rows: Rows, name: str, key: str) -> tuple[list[int], list[float]]:
    points = sorted((r["length"], r[key]) for r in rows if r["subject"] == name and r["status"] == "measured")
    return [length for length, _ in points], [value for _, value in points]


def _short(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)
