"""Owns the figure of accuracy against throughput: one panel per task, one marker per attention."""

from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Okabe and Ito's colours: told apart by every kind of colour vision; markers carry the same information
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_PANEL_ENTRIES = 14  # of a legend that fits where a panel would be
_LEAST_SPAN = 10  # points of accuracy on the y axis
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")


def accuracy_against_throughput(frame: pd.DataFrame, datasets: list[str], attentions: list[str]) -> Figure:
    """x: training examples per second (log), y: test accuracy in percent; the dashed line is the majority class."""
    done = frame[frame["status"] == "finished"]
    finished = set(done.loc[done["dataset"].isin(datasets), "attention"])
    legend_in_panel = len(finished.intersection(attentions)) <= _PANEL_ENTRIES
    places = len(datasets) + legend_in_panel  # the last one holds the legend
    columns = min(3, places)
    rows = -(-places // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(max(4.2 * columns, 8.4), 3.3 * rows), squeeze=False, layout="constrained"
    )
    panels = list(axes.flat)
    handles = {}
    for panel, dataset in zip(panels, datasets, strict=False):
        for place, attention in enumerate(attentions):
            group = done[(done["dataset"] == dataset) & (done["attention"] == attention)]
            if not len(group):
                continue
            accuracy = 100 * group["accuracy"]
            spread = accuracy.std(ddof=1) if len(group) > 1 else None
            handles[attention] = panel.errorbar(
                group["train_examples_per_second"].median(),
                accuracy.mean(),
                yerr=spread,
                fmt=_MARKERS[place % len(_MARKERS)],
                color=_COLOURS[place % len(_COLOURS)],
                markersize=8,
                markeredgecolor="white",
            )
        group = done[done["dataset"] == dataset]
        if len(group):
            panel.axhline(100 * group["majority"].iloc[0], color="0.45", linestyle="--", linewidth=1)
        panel.set_title(dataset, fontsize=9)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.margins(0.18)
        low, high = panel.get_ylim()
        if high - low < _LEAST_SPAN:  # a panel of noise must not look like a panel of differences
            panel.set_ylim((low + high - _LEAST_SPAN) / 2, (low + high + _LEAST_SPAN) / 2)
        panel.set_xlabel("training examples per second", fontsize=8)
        panel.set_ylabel("test accuracy (%)", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(color="0.9")
    for panel in panels[len(datasets) :]:
        panel.axis("off")
    dashed = plt.Line2D([], [], color="0.45", linestyle="--", linewidth=1)
    entries = [*handles.values(), dashed], [*handles, "majority class"]
    if legend_in_panel:
        panels[len(datasets)].legend(*entries, loc="center", fontsize=9, frameon=False)
        return figure
    width, height = figure.get_size_inches()
    per_row = int(width / 1.7)  # inches of an entry
    figure.set_size_inches(width, height + 0.19 * -(-len(entries[0]) // per_row))
    figure.legend(*entries, loc="outside lower center", ncols=per_row, fontsize=7, frameon=False, markerscale=0.7)
    return figure


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """PNG and PDF beside each other. No time stamp goes into the files: the same records give the same bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, pdf = stem.with_suffix(".png"), stem.with_suffix(".pdf")
    figure.savefig(png, dpi=160, metadata={"Software": None})
    figure.savefig(pdf, metadata={"CreationDate": None, "Producer": None, "Creator": None})
    plt.close(figure)
    return [png, pdf]
