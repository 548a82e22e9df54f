"""Owns the figures of the speed-accuracy study."""

import textwrap

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from omegaconf import DictConfig

from lra.studies.schoenbat_figures import COLOURS, MARKERS


def frontier_figure(points: pd.DataFrame, times: pd.DataFrame, study: DictConfig, families: list[str]) -> Figure:
    """One panel per kind of inputs and length; members of the front are named and joined."""
    figure, panels = _panels(study)
    for row, kind in zip(panels, study.inputs, strict=True):
        for panel, length in zip(row, study.lengths, strict=True):
            group = points[(points["inputs"] == kind) & (points["length"] == length)]
            _marks(panel, group, families, "error")
            front = group[group["on_front"]].sort_values("seconds")
            panel.plot(1e3 * front["seconds"], front["error"], color="0.2", linewidth=1, zorder=1)
            _names(panel, front, "error", f"{kind} attention, L = {length}; on the front:")
            target = times[(times["length"] == length) & (times["attention"] == study.target)]["seconds"].min()
            panel.axvline(1e3 * target, color="0.5", linestyle=":", linewidth=1)
    _finish(figure, panels, families, f"output error against {study.target} / signal", "exact softmax (time)")
    return figure


def own_figure(points: pd.DataFrame, study: DictConfig, families: list[str]) -> Figure:
    """The same against the exact form that a mechanism has of its own, all of them named."""
    figure, panels = _panels(study)
    with_own = points[points["own_error"].notna()]
    for row, kind in zip(panels, study.inputs, strict=True):
        for panel, length in zip(row, study.lengths, strict=True):
            group = with_own[(with_own["inputs"] == kind) & (with_own["length"] == length)]
            _marks(panel, group, families, "own_error")
            _names(panel, group, "own_error", f"{kind} attention, L = {length}")
    shown = [family for family in families if family in set(with_own["family"])]
    _finish(figure, panels, families, "output error against its own exact form / signal", None, shown)
    return figure


def _panels(study: DictConfig) -> tuple[Figure, list[list[Axes]]]:
    rows, columns = len(study.inputs), len(study.lengths)
    figure, panels = plt.subplots(
        rows, columns, figsize=(5.6 * columns, 4.2 * rows + 0.6), sharey="row", sharex="col", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    return figure, panels.tolist()


def _marks(panel: Axes, group: pd.DataFrame, families: list[str], column: str) -> None:
    for place, family in enumerate(families):
        members = group[group["family"] == family]
        if not len(members):
            continue
        spread = 0 * members["seconds"], 1e3 * (members["seconds_median"] - members["seconds"])
        tall = (members["error"] - members["error_low"], members["error_high"] - members["error"])
        panel.errorbar(
            1e3 * members["seconds"], members[column], xerr=spread, yerr=tall if column == "error" else None,
            fmt=MARKERS[place], color=COLOURS[place], markersize=6, markeredgecolor="white", elinewidth=0.8, alpha=0.9,
            zorder=2,
        )  # fmt: skip
    panel.axhline(1, color="0.5", linestyle="--", linewidth=1)
    panel.set(xscale="log", yscale="log")


def _names(panel: Axes, members: pd.DataFrame, column: str, title: str) -> None:
    """Numbers at the marks, from the fastest on, and their key in the title: names would run into each other."""
    key = []
    for place, row in enumerate(members.sort_values("seconds").itertuples(), start=1):
        side = -1 if place % 2 else 1  # neighbours write to different sides
        panel.annotate(
            str(place), (1e3 * row.seconds, getattr(row, column)), xytext=(0, 8 * side), textcoords="offset points",
            fontsize=8, fontweight="bold", ha="center", va="center",
        )  # fmt: skip
        key.append(f"{place}\u00a0{row.attention}")
    panel.set_title(f"{title}\n" + textwrap.fill("  ".join(key), 84), fontsize=8)


def _finish(
    figure: Figure, panels: list[list[Axes]], families: list[str], label: str, dotted: str | None,
    shown: list[str] | None = None,
) -> None:  # fmt: skip
    for row in panels:
        row[0].set_ylabel(label, fontsize=8)
        for panel in row:
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
            panel.tick_params(which="both", labelsize=8)
            panel.grid(color="0.92")
            panel.set_axisbelow(True)
            panel.margins(0.12, 0.16)
    for panel in panels[-1]:
        panel.set_xlabel("milliseconds of one forward, one head: fastest round (bar: to the median)", fontsize=8)
    handles = [
        plt.Line2D([], [], color=COLOURS[families.index(name)], marker=MARKERS[families.index(name)], linestyle="")
        for name in shown or families
    ]
    labels = list(shown or families)
    handles.append(plt.Line2D([], [], color="0.5", linestyle="--", linewidth=1))
    labels.append("mean pooling")
    if dotted:
        handles += [
            plt.Line2D([], [], color="0.5", linestyle=":", linewidth=1),
            plt.Line2D([], [], color="0.2", linewidth=1),
        ]
        labels += [dotted, "Pareto front"]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
