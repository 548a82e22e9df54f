"""Owns the figures of the study of FAVOR#'s variance."""

from collections.abc import Sequence

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy import stats

from lra.studies.estimators import STYLES, legend_handles

_BAND = 1.96  # standard deviations over draws


def curves_figure(curves: pd.DataFrame, names: Sequence[str], baseline: str, claimed: float) -> Figure:
    """Above: log-variance over sigma, one panel per set. Below: what each estimator saves against the baseline."""
    sets = list(dict.fromkeys(curves["set"]))
    figure, axes = plt.subplots(2, len(sets), figsize=(3.7 * len(sets), 6.8), sharex=True, sharey="row", squeeze=False)
    for column, kind in enumerate(sets):
        part = curves[curves["set"] == kind]
        reference = part[(part["estimator"] == baseline) & ~part["key_shift"]].set_index(["sigma", "draw"])
        for name in names:
            for shifted in (False, True):
                rows = part[(part["estimator"] == name) & (part["key_shift"] == shifted)].set_index(["sigma", "draw"])
                if rows.empty:
                    continue
                _line(axes[0, column], rows["log_variance"], name, shifted)
                _line(axes[1, column], reference["log_variance"] - rows["log_variance"], name, shifted)
        axes[0, column].set_title(f"{kind} set", fontsize=10)
        axes[1, column].axhline(claimed, color="0.3", linewidth=1, linestyle=":")
        axes[0, column].set_yscale("log")
        axes[0, column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes[0, column].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes[0, column].yaxis.set_minor_formatter(NullFormatter())
        axes[1, column].set_ylim(-0.25 * claimed, 1.35 * claimed)
        axes[1, column].set_xlabel("scale σ of q and k (per coordinate)", fontsize=9)
        for panel in axes[:, column]:
            panel.grid(color="0.92")
            panel.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("mean log-variance of one feature (nats)", fontsize=9)
    axes[1, 0].set_ylabel(f"nats below {baseline}, keys as they are", fontsize=9)
    axes[1, 0].annotate(
        f"claim: $e^{{{claimed:g}}}$", (curves["sigma"].min(), claimed), textcoords="offset points", xytext=(0, 4),
        fontsize=8, color="0.3",
    )  # fmt: skip
    figure.legend(handles=legend_handles(names, shifted=True), loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure


def _line(panel: Axes, values: pd.Series, name: str, shifted: bool) -> None:
    """Mean over draws, and a band that holds 95 % of them."""
    by_sigma = values.groupby(level="sigma")
    mean, spread = by_sigma.mean(), _BAND * by_sigma.std()
    style = STYLES[name]
    panel.plot(
        mean.index, mean, color=style.color, marker=style.marker, markersize=style.size, linewidth=1.2,
        linestyle="--" if shifted else "-", zorder=style.layer,
    )  # fmt: skip
    panel.fill_between(mean.index, mean - spread, mean + spread, color=style.color, alpha=0.15, linewidth=0)


def monte_carlo_figure(sampled: pd.DataFrame, names: Sequence[str], converged: float) -> Figure:
    """Sampled minus closed form over the closed form's own size; hollow where the sample has not converged."""
    figure, panel = plt.subplots(figsize=(7.2, 4.4))
    cells = sampled.groupby(["estimator", "sigma"]).agg(
        gap=("log_ratio", "mean"), error=("log_ratio", "sem"), relative_error=("relative_error", "first")
    )
    student = stats.t.ppf(0.975, sampled["repeat"].nunique() - 1)
    for place, name in enumerate(names):
        style, part = STYLES[name], cells.loc[name]
        beside = part.index * (1 + 0.016 * (place - (len(names) - 1) / 2))  # bars of one sigma do not hide each other
        panel.plot(beside, part["gap"], color=style.color, linewidth=0.8, alpha=0.6)
        for x, (_, row) in zip(beside, part.iterrows(), strict=True):
            panel.errorbar(
                x, row["gap"], yerr=student * row["error"], color=style.color, fmt=style.marker, markersize=5, capsize=2,
                markerfacecolor=style.color if row["relative_error"] < converged else "white", linewidth=1,
            )  # fmt: skip
    sigmas = sorted(set(sampled["sigma"]))
    panel.axhline(0, color="0.3", linewidth=1)
    panel.set_xscale("log")
    panel.set_xticks(sigmas, [f"{sigma:g}" for sigma in sigmas])
    panel.minorticks_off()
    panel.set_yscale("symlog", linthresh=0.1)
    panel.set_ylim(bottom=min(-0.2, 2 * cells["gap"].min()))
    panel.set_xlabel("scale σ of q and k (heterogeneous set)", fontsize=9)
    panel.set_ylabel("sampled minus closed-form log-variance (nats)", fontsize=9)
    panel.set_title(f"filled: sampled variance known to {100 * converged:g} %; bars: 95 % interval", fontsize=9)
    panel.grid(color="0.92")
    panel.tick_params(labelsize=8)
    figure.legend(handles=legend_handles(names, shifted=False), loc="lower center", ncols=8, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def offset_figure(offsets: pd.DataFrame, baseline: str, claimed: float, sigma: float) -> Figure:
    """Nats below the baseline over the mean of y."""
    figure, panel = plt.subplots(figsize=(6.2, 4.4))
    names = list(dict.fromkeys(offsets["estimator"]))
    names = [name for name in STYLES if name in names]
    for (name, shifted), rows in offsets.groupby(["estimator", "key_shift"]):
        _line(panel, rows.set_index(["offset", "draw"])["gain"].rename_axis(["sigma", "draw"]), name, shifted)
    panel.axhline(claimed, color="0.3", linewidth=1, linestyle=":")
    panel.annotate(
        f"claim: $e^{{{claimed:g}}}$", (0, claimed), textcoords="offset points", xytext=(0, 4), fontsize=8, color="0.3"
    )
    panel.set_xlabel(f"mean of every coordinate of y (units of σ = {sigma:g})", fontsize=9)
    panel.set_ylabel(f"nats below {baseline}, keys as they are", fontsize=9)
    panel.grid(color="0.92")
    panel.tick_params(labelsize=8)
    figure.legend(handles=legend_handles(names, shifted=True), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


def recorded_figure(recorded: pd.DataFrame, names: Sequence[str], baseline: str, source: str) -> Figure:
    """Nats below the baseline at each layer and head; bars hold 95 % of the examples."""
    places = list(dict.fromkeys(recorded["place"]))
    figure, panel = plt.subplots(figsize=(9.2, 4.4))
    reference = recorded[(recorded["estimator"] == baseline) & ~recorded["key_shift"]].set_index(["place", "example"])
    shown = [(name, shifted) for name in names for shifted in (False, True)]
    width = 0.8 / len(shown)
    for offset, (name, shifted) in enumerate(shown):
        rows = recorded[(recorded["estimator"] == name) & (recorded["key_shift"] == shifted)]
        if rows.empty:
            continue
        gain = reference["log_variance"] - rows.set_index(["place", "example"])["log_variance"]
        by_place = gain.groupby(level="place")
        style = STYLES[name]
        panel.errorbar(
            [place + (offset - len(shown) / 2) * width for place in range(len(places))],
            by_place.mean().reindex(places), yerr=_BAND * by_place.std().reindex(places), fmt=style.marker,
            color=style.color, markerfacecolor="white" if shifted else style.color, markersize=5.5, capsize=2,
            linewidth=1,
        )  # fmt: skip
    panel.axhline(0, color="0.3", linewidth=1)
    for place in range(1, len(places)):
        panel.axvline(place - 0.5, color="0.85", linewidth=1)
    panel.set_xlim(-0.5, len(places) - 0.5)
    panel.set_xticks(range(len(places)), places)
    panel.set_ylabel(f"nats below {baseline}, keys as they are", fontsize=9)
    panel.set_title(source, fontsize=9)
    panel.grid(axis="y", color="0.92")
    panel.tick_params(labelsize=8)
    handles = legend_handles(names, shifted=False)
    for label, inside in (("keys as they are", "0.4"), ("keys shifted", "white")):
        handles.append(plt.Line2D([], [], color="0.4", marker="o", markersize=5, markerfacecolor=inside, label=label))
    for handle in handles:
        handle.set_linestyle("none")
    figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure
