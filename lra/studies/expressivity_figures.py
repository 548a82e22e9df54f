"""Owns the figures of the study of expressivity."""

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from omegaconf import DictConfig

from lra.studies.expressivity_verdicts import claimed_degree, closed_threshold, wilson

_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")


def separation_figure(frame: pd.DataFrame, closed: pd.DataFrame, study: DictConfig) -> Figure:
    """One panel per length: firing rate over the degree, with the closed form and its threshold."""
    columns = len(study.lengths)
    figure, axes = plt.subplots(1, columns, figsize=(3.6 * columns, 4.2), sharey=True, squeeze=False)
    names = [name for name, entry in study.mechanisms.items() if "degrees" in entry]
    for panel, length in zip(axes[0], study.lengths, strict=True):
        part = closed[(closed["length"] == length) & (closed["set"] == 1)]
        panel.plot(part["degree"], part["fires"], color="0.3", linewidth=1.2)
        panel.axvline(closed_threshold(closed, length), color="0.6", linestyle=":")
        for place, name in enumerate(names):
            group = frame[(frame["mechanism"] == name) & (frame["length"] == length)]
            group = group.assign(degree=group["degree"] + 0.16 * (place - (len(names) - 1) / 2))
            trials = study.draws if study.mechanisms[name].random else study.draws * study.sign_draws
            for kind in (0, 1):
                joined = kind == 1 and name != "polynomial"
                _rates(panel, group[group["set"] == kind], "degree", place, "-" if joined else "none", trials)
        panel.set_title(f"n = {length}", fontsize=10)
        panel.set_xlabel("degree β", fontsize=9)
        panel.set_xticks(range(2, 11, 2))
        _dress(panel)
    axes[0, 0].set_ylabel("probability that the readout fires", fontsize=9)
    handles = [
        plt.Line2D([], [], color=_COLORS[place], marker=_MARKERS[place], label=study.mechanisms[name].label)
        for place, name in enumerate(names)
    ]
    handles += [
        plt.Line2D([], [], color="0.4", marker="o", linestyle="none", label="with the feature"),
        plt.Line2D([], [], color="0.4", marker="o", linestyle="none", markerfacecolor="white", label="without it"),
        plt.Line2D([], [], color="0.3", label="closed form, exact polynomial"),
        plt.Line2D([], [], color="0.6", linestyle=":", label="its smallest even degree"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    return figure


def temperature_figure(frame: pd.DataFrame, study: DictConfig) -> Figure:
    """Firing rate over the temperature. Above: with the feature, found. Below: without it, false alarms."""
    names = [name for name, entry in study.mechanisms.items() if "temperatures" in entry]
    figure, axes = plt.subplots(2, len(names), figsize=(3.0 * len(names), 5.4), sharex=True, sharey=True, squeeze=False)
    for column, name in enumerate(names):
        for place, length in enumerate(study.lengths):
            group = frame[(frame["mechanism"] == name) & (frame["length"] == length)]
            plain = (length**0.5 + 2) ** -0.5  # 1/sqrt(d)
            beside = 1 + 0.1 * (place - 1)
            group = group.assign(temperature=group["temperature"].fillna(plain) * beside)
            trials = study.draws if study.mechanisms[name].random else study.draws * study.sign_draws
            for row, kind in enumerate((1, 0)):
                _rates(axes[row, column], group[group["set"] == kind], "temperature", place, "-", trials)
        axes[0, column].set_title(study.mechanisms[name].label, fontsize=9)
        axes[1, column].set_xlabel("temperature (factor of q·k)", fontsize=9)
        axes[1, column].set_xscale("log", base=2)
        axes[1, column].set_xticks([0.25, 1, 4, 16, 64], ["1/4", "1", "4", "16", "64"])
        for panel in axes[:, column]:
            _dress(panel)
    axes[0, 0].set_ylabel("P(fires), with the feature", fontsize=9)
    axes[1, 0].set_ylabel("P(fires), without it: false alarm", fontsize=9)
    handles = [
        plt.Line2D([], [], color=_COLORS[place], marker=_MARKERS[place], label=f"n = {length}")
        for place, length in enumerate(study.lengths)
    ]
    figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle("leftmost points: the mechanisms as they are, temperature 1/√d; bars: 95 % intervals", fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    return figure


def _rates(panel: Axes, group: pd.DataFrame, swept: str, place: int, line: str, trials: int) -> None:
    """Firing rates with 95 % intervals; hollow markers for the set without the feature.

    `trials`: readouts where they are independent; draws where several readouts share one draw of the mechanism.
    """
    mean = group.groupby(swept)["fires"].mean()
    bounds = [wilson(rate, trials) for rate in mean]
    low = [max(0.0, rate - bound) for rate, (bound, _) in zip(mean, bounds, strict=True)]
    high = [max(0.0, bound - rate) for rate, (_, bound) in zip(mean, bounds, strict=True)]
    hollow = bool((group["set"] == 0).all())
    panel.errorbar(
        mean.index, mean, yerr=[low, high], color=_COLORS[place], marker=_MARKERS[place], linestyle=line,
        linewidth=1.1, markersize=4.5, capsize=2, elinewidth=0.7,
        markerfacecolor="white" if hollow else _COLORS[place],
    )  # fmt: skip


def _dress(panel: Axes) -> None:
    panel.set_ylim(-0.05, 1.05)
    panel.grid(color="0.92")
    panel.tick_params(labelsize=8)


def training_figure(trained: pd.DataFrame, closed: pd.DataFrame, study: DictConfig) -> Figure:
    """Test accuracy over the degree: before training (hollow) and after, one panel per length and trained half."""
    panels = list(trained.groupby(["length", "trains"], sort=False))
    figure, axes = plt.subplots(1, len(panels), figsize=(3.1 * len(panels), 3.9), sharey=True)
    for panel, ((length, trains), group) in zip(axes, panels, strict=True):
        for column, color, hollow, shift in (
            ("accuracy_before", "0.5", True, -0.1),
            ("accuracy", _COLORS[0], False, 0.1),
        ):
            by_degree = group.groupby("degree")[column]
            mean = 100 * by_degree.mean()
            panel.errorbar(
                mean.index + shift, mean, yerr=[mean - 100 * by_degree.min(), 100 * by_degree.max() - mean], marker="o",
                color=color, markerfacecolor="white" if hollow else color, markersize=5, capsize=2, linewidth=1,
            )  # fmt: skip
        panel.axvline(claimed_degree(closed, study, length), color="0.6", linestyle=":")
        panel.set_title(f"n = {length}, {trains} trained", fontsize=9)
        panel.set_xlabel("degree β", fontsize=9)
        panel.set_xticks(list(study.training.degrees))
        panel.set_ylim(45, 103)
        panel.grid(color="0.92")
        panel.tick_params(labelsize=8)
    axes[0].set_ylabel("test accuracy (%)", fontsize=9)
    handles = [
        plt.Line2D([], [], color="0.5", marker="o", markerfacecolor="white", label="before training"),
        plt.Line2D([], [], color=_COLORS[0], marker="o", label=f"after {study.training.steps} steps"),
        plt.Line2D([], [], color="0.6", linestyle=":", label="even degree that separates untrained, a = 1"),
    ]
    figure.legend(handles=handles, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(f"means of {study.training.seeds} models, bars from the worst to the best", fontsize=9)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure
