"""Owns the figures of the kernel-regression study."""

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from omegaconf import DictConfig

from lra.studies.estimators import STYLES, legend_handles, student_interval


def scores_figure(scores: pd.DataFrame, study: DictConfig, regression: set[str]) -> Figure:
    """One panel per set: test score over F; bands are 95 % intervals of the mean over draws."""
    columns = 4
    rows = -(-(len(study.sets) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.1 * columns, 2.9 * rows), squeeze=False)
    for panel, kind in zip(axes.flat, study.sets, strict=False):
        part = scores[scores["set"] == kind]
        for (name, shifted), group in part[part["estimator"].isin(study.order)].groupby(["estimator", "key_shift"]):
            found = {width: student_interval(100 * values["score"]) for width, values in group.groupby("num_features")}
            style = STYLES[name]
            panel.plot(
                list(found), [mean for mean, _ in found.values()], color=style.color, marker=style.marker,
                markersize=style.size, linewidth=1.1, linestyle="--" if shifted else "-", zorder=style.layer,
            )  # fmt: skip
            low, high = zip(*(interval for _, interval in found.values()), strict=True)
            panel.fill_between(list(found), low, high, color=style.color, alpha=0.12, linewidth=0)
        panel.axhline(100 * part[part["estimator"] == "exact"]["score"].iloc[0], color="0.4", linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_xticks(list(study.num_features), [str(width) for width in study.num_features])
        panel.set_title(kind.replace("_", " "), fontsize=9)
        panel.set_ylabel("R² x 100 (test)" if kind in regression else "test accuracy (%)", fontsize=8)
        panel.set_xlabel("number of features F", fontsize=8)
        panel.grid(color="0.92")
        panel.tick_params(labelsize=8)
    for panel in list(axes.flat)[len(study.sets) :]:
        panel.axis("off")
    handles = legend_handles(list(study.order), shifted=True)
    handles.append(plt.Line2D([], [], color="0.4", linestyle=":", label="exact kernel"))
    list(axes.flat)[len(study.sets)].legend(handles=handles, loc="center", fontsize=8, frameon=False)
    figure.tight_layout()
    return figure


def ranks_figure(ranks: pd.DataFrame, study: DictConfig) -> Figure:
    """Mean rank over the classification sets for each width, with 95 % intervals over draws."""
    figure, panel = plt.subplots(figsize=(6.4, 3.8))
    for place, name in enumerate(study.order):
        part = ranks[ranks["estimator"] == name]
        for offset, (width, group) in enumerate(part.groupby("num_features")):
            mean, (low, high) = student_interval(group.groupby("draw")["rank"].mean())
            shade = 0.35 + 0.65 * offset / max(1, len(study.num_features) - 1)
            panel.errorbar(
                place + 0.14 * (offset - (len(study.num_features) - 1) / 2), mean, yerr=[[mean - low], [high - mean]],
                fmt=STYLES[name].marker, color=STYLES[name].color, alpha=shade, capsize=2, markersize=6,
                label=f"{width}" if place == 0 else None,
            )  # fmt: skip
    panel.set_xticks(range(len(study.order)), list(study.order))
    panel.invert_yaxis()
    panel.set_ylabel(f"mean rank of {len(study.order)} (1 is best)", fontsize=9)
    widths = ", ".join(str(width) for width in study.num_features)
    panel.set_title(f"kernel classification; from left (pale) to right: F = {widths}", fontsize=9)
    panel.grid(axis="y", color="0.92")
    panel.tick_params(labelsize=8)
    figure.tight_layout()
    return figure
