"""Owns the figures of the study of SchoenbAt's approximation."""

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from omegaconf import DictConfig
from scipy.stats import beta

# Okabe and Ito's colours: told apart by every kind of colour vision; markers and dashes carry the same information
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
KERNELS = {
    "exp": "$e^t$",
    "inverse": "$1/(1-t)$",
    "log": r"$1-\ln(1-t)$",
    "trigh": "trigh (= exp)",
    "sqrt": r"$2-\sqrt{1-t}$",
}
_AXES = {
    "tau": r"temperature $\tau$ (published: 1)", "head_dim": "head dimension $D$",
    "common": "energy of q, k in one shared direction", "decay": "decay $a$ of the spectrum $i^{-a}$",
}  # fmt: skip


def moments(frame: pd.DataFrame) -> Figure:
    """Left: mean of the estimate minus K. Right: variance of one feature over its closed form. One mark per pair."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    kernels = list(frame["kernel"].unique())
    for place, kernel in enumerate(kernels):
        group = frame[frame["kernel"] == kernel]
        x = place + np.linspace(-0.32, 0.32, len(group))
        style = {"fmt": MARKERS[place], "color": COLOURS[place], "markersize": 4, "elinewidth": 1}
        bias = group["mean"] - group["truncated_series"]
        panels[0].errorbar(x, bias, yerr=1.96 * group["mean_error"], **style)
        panels[1].errorbar(x, group["variance_ratio"], yerr=1.96 * group["variance_ratio_error"], **style)
    count = int(frame["samples"].iloc[0])
    panels[0].set_title(f"Bias of the kernel estimate ({count:,} features)", fontsize=9)
    panels[0].set_ylabel("mean estimate $-$ K  (95 % interval)", fontsize=8)
    panels[1].set_title("Variance of one feature", fontsize=9)
    panels[1].set_ylabel("measured / closed form  (95 % interval)", fontsize=8)
    for panel, level in zip(panels, (0.0, 1.0), strict=True):
        panel.axhline(level, color="0.4", linewidth=1, linestyle="--")
        panel.set_xticks(range(len(kernels)), [KERNELS[kernel] for kernel in kernels], fontsize=8)
        panel.set_xlabel("kernel; one mark per pair of a query and a key, the first with equal ones", fontsize=8)
        _plain(panel)
    return figure


def concentration(tail: pd.DataFrame, num_features: int) -> Figure:
    """P(|estimate - K| >= epsilon): measured, Chebyshev's bound with the exact variance, Hoeffding's bound."""
    kernels = [kernel for kernel in tail["kernel"].unique() if kernel != "trigh"]
    figure, panels = plt.subplots(
        1, len(kernels), figsize=(3.0 * len(kernels), 3.7), sharey=True, layout="constrained", squeeze=False
    )
    for panel, kernel in zip(panels[0], kernels, strict=True):
        group = tail[tail["kernel"] == kernel]
        draws, hits = group["draws"].to_numpy(), group["exceeding"].to_numpy()
        low = np.where(hits > 0, beta.ppf(0.025, np.maximum(hits, 1), draws - hits + 1), 0)
        high = beta.ppf(0.975, hits + 1, np.maximum(draws - hits, 1e-9))
        seen = hits > 0
        panel.fill_between(group["epsilon"], low.clip(1e-6), high, color=COLOURS[0], alpha=0.2, linewidth=0)
        measured = panel.plot(group["epsilon"][seen], group["measured"][seen], color=COLOURS[0], marker=".")[0]
        chebyshev = panel.plot(group["epsilon"], group["chebyshev"], color=COLOURS[2], linestyle="--")[0]
        hoeffding = panel.plot(group["epsilon"], group["hoeffding"], color=COLOURS[1], linestyle="-.")[0]
        panel.set(xscale="log", yscale="log", ylim=(1e-4, 2))
        panel.set_title(KERNELS[kernel], fontsize=9)
        panel.set_xlabel(r"error $\varepsilon$ of the kernel", fontsize=8)
        _plain(panel)
    panels[0][0].set_ylabel(r"P(|estimate $-$ K| $\geq\varepsilon$)", fontsize=8)
    figure.legend(
        [measured, chebyshev, hoeffding],
        [f"measured, F = {num_features} (95 % band)", "Chebyshev with the exact variance", "Hoeffding, the papers' kind of bound"],
        loc="outside lower center", ncols=3, fontsize=8, frameon=False,
    )  # fmt: skip
    return figure


def slope(frame: pd.DataFrame) -> Figure:
    """Root mean squared error over draws against F, log-log, with the law 1/sqrt(F - 1) beside it."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    titles = {"kernel_error": "Kernel matrix", "output_error": "Attention output"}
    labels = {"kernel_error": "root mean squared error", "output_error": "error / signal (1 = mean pooling)"}
    for panel, column in zip(panels, titles, strict=True):
        for place, (kernel, group) in enumerate(frame.groupby("kernel", sort=False)):
            if kernel == "trigh":
                continue
            grid = group.pivot(index="draw", columns="num_features", values=column)
            panel.fill_between(grid.columns, grid.quantile(0.1), grid.quantile(0.9), color=COLOURS[place], alpha=0.15)
            middle = (grid**2).mean() ** 0.5
            panel.plot(
                grid.columns, middle, color=COLOURS[place], marker=MARKERS[place], markersize=4, label=KERNELS[kernel]
            )
        f = np.array(sorted(frame["num_features"].unique()), dtype=float)
        anchor = float((frame[frame["kernel"] == "exp"].groupby("num_features")[column].mean()).iloc[-1])
        law = 0.25 * anchor * np.sqrt((f[-1] - 1) / (f - 1))
        panel.plot(f, law, color="0.3", linestyle=":", label=r"slope $-1/2$, shifted down")
        panel.set(xscale="log", yscale="log")
        _powers_of_two(panel, f)
        panel.set_title(titles[column], fontsize=9)
        panel.set_xlabel("number of features F", fontsize=8)
        panel.set_ylabel(labels[column], fontsize=8)
        _plain(panel)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8, frameon=False
    )
    return figure


def equal_time(frame: pd.DataFrame, num_features: int) -> Figure:
    """Median output error against F, and against the time of one forward."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.9), sharey=True, layout="constrained")
    for place, (name, group) in enumerate(frame.groupby("estimator", sort=False)):
        by_width = group.groupby("num_features")
        error = by_width["output_error"]
        style = {
            "color": COLOURS[place], "marker": MARKERS[place], "markersize": 5, "capsize": 2, "elinewidth": 1, "linewidth": 1.2,
        }  # fmt: skip
        bars = [error.median() - error.quantile(0.1), error.quantile(0.9) - error.median()]
        panels[0].errorbar(error.median().index, error.median(), yerr=bars, label=name, **style)
        fastest, middle = 1e3 * by_width["seconds"].first(), 1e3 * by_width["seconds_median"].first()
        panels[1].errorbar(fastest, error.median(), xerr=[0 * middle, middle - fastest], **style)
    published = frame[(frame["estimator"] == "published") & (frame["num_features"] == num_features)]
    panels[0].axvline(num_features, color="0.5", linestyle=":", linewidth=1)
    panels[1].axvline(1e3 * published["seconds"].iloc[0], color="0.5", linestyle=":", linewidth=1)
    for panel in panels:
        panel.axhline(1, color="0.5", linewidth=1, linestyle="--")
        panel.set(xscale="log", yscale="log")
        _plain(panel)
    _powers_of_two(panels[0], np.array(sorted(set(frame["num_features"]) & {2**n for n in range(14)})))
    panels[1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0].set_xlabel(f"number of features F (dotted: the published {num_features})", fontsize=8)
    panels[1].set_xlabel(
        f"milliseconds, fastest round, bar to the median (dotted: {num_features} published)", fontsize=8
    )
    panels[0].set_ylabel("output error / signal (dashed: mean pooling)", fontsize=8)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return figure


def regime(table: pd.DataFrame, study: DictConfig) -> Figure:
    """Error over signal along each axis, one column per axis and one row per kernel."""
    axes = list(_AXES)
    kernels = list(table["kernel"].unique())
    figure, panels = plt.subplots(
        len(kernels), len(axes), figsize=(3.0 * len(axes), 2.7 * len(kernels) + 0.5), sharey=True, sharex="col",
        layout="constrained", squeeze=False,
    )  # fmt: skip
    isotropic = table[(table["axis"] == "tau") & (table["tau"] == 1.0)]
    for row, kernel in zip(panels, kernels, strict=True):
        for panel, axis in zip(row, axes, strict=True):
            group = table[(table["axis"] == axis) & (table["kernel"] == kernel)]
            if axis in ("common", "decay"):  # the isotropic case is their zero
                group = pd.concat([isotropic[isotropic["kernel"] == kernel], group])
            _curves(panel, group, axis)
            panel.set(yscale="log", ylim=(3e-3, 30))
            if axis in ("tau", "head_dim"):
                _powers_of_two(panel, np.sort(table[table["axis"] == axis][axis].unique()))
            panel.axhline(1, color="0.5", linewidth=1, linestyle="--")
            _plain(panel)
        row[0].set_ylabel(f"{KERNELS[kernel]}\noutput error / signal", fontsize=8)
    for panel, axis in zip(panels[-1], axes, strict=True):
        panel.set_xlabel(_AXES[axis], fontsize=8)
    handles, labels = panels[0][0].get_legend_handles_labels()
    named = {
        "published": f"published, {study.num_features} features",
        "schoenbat_plus": f"schoenbat_plus, {study.num_features}",
    }
    labels = [named.get(label, label + " (1 + D)") for label in labels]
    handles.append(plt.Line2D([], [], color="0.5", linestyle="--", linewidth=1))
    figure.legend(handles, [*labels, "mean pooling"], loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _curves(panel: Axes, group: pd.DataFrame, axis: str) -> None:
    for place, (name, curve) in enumerate(group.groupby("estimator", sort=False)):
        panel.fill_between(curve[axis], curve["low"], curve["high"], color=COLOURS[place], alpha=0.2, linewidth=0)
        panel.plot(curve[axis], curve["error"], color=COLOURS[place], marker=MARKERS[place], markersize=4, label=name)
        for row in curve[curve["error"] > 30].itertuples():
            panel.annotate(
                f"{row.error:.0e}", (getattr(row, axis), 29), fontsize=7, color=COLOURS[place], ha="right", va="top",
                xytext=(-6, -2), textcoords="offset points",
            )  # fmt: skip


def _powers_of_two(panel: Axes, values: np.ndarray) -> None:
    panel.set_xscale("log", base=2)
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.xaxis.set_minor_formatter(NullFormatter())


def _plain(panel: Axes) -> None:
    panel.tick_params(which="both", labelsize=8)
    panel.grid(color="0.92")
    panel.set_axisbelow(True)
