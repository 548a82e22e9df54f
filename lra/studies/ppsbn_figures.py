"""Owns the figures of the ppSBN ablation."""

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from lra.studies.schoenbat_figures import COLOURS, KERNELS, MARKERS

_PRE = {
    "none": "no pre-SBN (no curve where the kernel is undefined)",
    "l2": "l2 norm only",
    "token": "pre-SBN per token (published)",
    "batch": "pre-SBN over the batch",
}
_QUANTITIES = {
    "error": "output error / signal",
    "negative_denominators": "share of negative denominators",
    "gradient": "|dq| / |dq| of exact attention",
}


def approximation(frame: pd.DataFrame, study: DictConfig) -> Figure:
    """Rows: error, negative denominators, gradient norm; columns: kernels; x: size of q and k; dashes: temperature."""
    frame = frame.assign(gradient=frame["gradient"] / frame["exact_gradient"])
    kernels = list(study.kernels)
    figure, panels = plt.subplots(
        len(_QUANTITIES), len(kernels), figsize=(2.9 * len(kernels), 7.6), sharex=True, sharey="row", squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for row, (quantity, label) in zip(panels, _QUANTITIES.items(), strict=True):
        for panel, kernel in zip(row, kernels, strict=True):
            for place, pre in enumerate(study.pre):
                for tau, dash in zip(study.temperatures, ("-", "--", ":"), strict=False):
                    group = frame[(frame["kernel"] == kernel) & (frame["pre"] == pre) & (frame["tau"] == tau)]
                    _band(panel, group, quantity, place, dash)
            if quantity == "negative_denominators":
                panel.set_ylim(-0.03, 0.6)
            else:
                panel.set_yscale("log")
                panel.axhline(1, color="0.5", linewidth=1, linestyle=(0, (1, 3)))
            panel.set_xscale("log", base=2)
            panel.set_xticks(list(study.sizes), [f"{size:g}" for size in study.sizes])
            _plain(panel)
        row[0].set_ylabel(label, fontsize=8)
    for panel, kernel in zip(panels[0], kernels, strict=True):
        panel.set_title(KERNELS[kernel], fontsize=9)
    for panel in panels[-1]:
        panel.set_xlabel("root mean square of q and k", fontsize=8)
    handles = [
        plt.Line2D([], [], color=COLOURS[i], marker=MARKERS[i], markersize=4, label=_PRE.get(pre, pre))
        for i, pre in enumerate(study.pre)
    ]
    handles += [
        plt.Line2D([], [], color="0.3", linestyle=dash, label=rf"$\tau$ = {tau:g}")
        for tau, dash in zip(study.temperatures, ("-", "--", ":"), strict=False)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _band(panel: Axes, group: pd.DataFrame, quantity: str, place: int, dash: str) -> None:
    """Median and range over draws; sizes at which the kernel is undefined leave a gap."""
    grid = group.pivot(index="draw", columns="size", values=quantity)
    panel.fill_between(grid.columns, grid.min(), grid.max(), color=COLOURS[place], alpha=0.12, linewidth=0)
    panel.plot(
        grid.columns,
        grid.median(),
        color=COLOURS[place],
        linestyle=dash,
        marker=MARKERS[place],
        markersize=4,
        linewidth=1.2,
    )


def restore(frame: pd.DataFrame, study: DictConfig) -> Figure:
    """Share of softmax attention's signal that each way recovers after pre-SBN: mean and range over draws."""
    ways = list(frame["way"].unique())
    sizes = list(study.restore.sizes)
    figure, panel = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    width = 0.8 / len(sizes)
    for place, size in enumerate(sizes):
        grid = frame[frame["size"] == size].pivot(index="draw", columns="way", values="restored")[ways]
        x = [i + (place - (len(sizes) - 1) / 2) * width for i in range(len(ways))]
        spread = [grid.mean() - grid.min(), grid.max() - grid.mean()]
        panel.bar(
            x, grid.mean(), width, yerr=spread, capsize=3, color=COLOURS[place], alpha=0.85, label=f"q, k of size {size:g}",
            error_kw={"elinewidth": 1},
        )  # fmt: skip
    panel.axhline(1, color="0.4", linestyle="--", linewidth=1)
    panel.axhline(0, color="0.2", linewidth=0.8)
    panel.set_xticks(
        range(len(ways)), ["pre-SBN alone", r"$\gamma\,x$", r"$\gamma\,x^\beta$", r"temperature $\tau$"][: len(ways)]
    )
    panel.set_ylabel("share of softmax attention's signal\n(1 = all, 0 = mean pooling)", fontsize=8)
    panel.set_xlabel("what follows or replaces it, at its best (range over draws)", fontsize=8)
    _plain(panel)
    figure.legend(loc="outside lower center", ncols=len(sizes), fontsize=8, frameon=False)
    return figure


def training(runs: pd.DataFrame, curves: pd.DataFrame, study: DictConfig) -> Figure:
    """Left: final test accuracy, one mark per seed. Right: training loss, mean and range over seeds. A row per task."""
    tasks, variants = list(study.training.tasks), list(study.training.variants)
    figure, panels = plt.subplots(
        len(tasks), 2, figsize=(10.4, 3.6 * len(tasks) + 0.6), squeeze=False, layout="constrained",
        gridspec_kw={"width_ratios": [1, 1.3]},
    )  # fmt: skip
    for (left, right), task in zip(panels, tasks, strict=True):
        done = runs[(runs["task"] == task) & (runs["status"] == "finished")]
        for place, variant in enumerate(variants):
            seeds = done[done["variant"] == variant]
            style = {"color": COLOURS[place], "marker": MARKERS[place]}
            left.plot(100 * seeds["accuracy"], [place] * len(seeds), linestyle="", markersize=5, alpha=0.8, **style)
            left.plot([100 * seeds["accuracy"].mean()], [place], color="0.1", marker="|", markersize=16)
            grid = curves[(curves["task"] == task) & (curves["variant"] == variant)].pivot(
                index="seed", columns="step", values="loss"
            )
            right.fill_between(grid.columns, grid.min(), grid.max(), color=COLOURS[place], alpha=0.1, linewidth=0)
            right.plot(grid.columns, grid.mean(), linewidth=1.3, markersize=4, markevery=3, label=variant, **style)
        left.axvline(100 * done["majority"].max(), color="0.5", linestyle="--", linewidth=1)
        left.set_yticks(range(len(variants)), variants, fontsize=8)
        left.set_ylim(len(variants) - 0.5, -0.5)
        left.set_xlabel("test accuracy (%), one mark per seed, bar: mean, dashed: majority class", fontsize=8)
        left.set_title(f"{task}: accuracy after {study.training.tasks[task].num_steps} steps", fontsize=9)
        right.set_title(f"{task}: training loss, mean and range over seeds", fontsize=9)
        right.set_xlabel("step", fontsize=8)
        right.set_ylabel("cross-entropy (nats)", fontsize=8)
        _plain(left)
        _plain(right)
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _plain(panel: Axes) -> None:
    panel.tick_params(which="both", labelsize=8)
    panel.grid(color="0.92")
    panel.set_axisbelow(True)
