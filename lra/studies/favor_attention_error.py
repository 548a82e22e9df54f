"""Owns the study of FAVOR#'s attention error: output error over the number of features, on recorded q, k and v."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor, nn

from lra.studies.estimators import STYLES, build, check_draws, check_listed, legend_handles, members_of, variants
from lra.studies.recorded import Head, Recording, record
from lra.studies.runner import Outputs, Verdict
from lra.tables import Table


def run(config: DictConfig, outputs: Outputs) -> None:
    """Every estimator, with and without the key shift, against exact softmax on the same recorded tensors."""
    study, members = config.study, members_of(config, *config.study.claimed_order)
    check_listed(study, "compare_at", "num_features")
    check_listed(study, "slope_from", "num_features")
    check_draws(study, "draws")
    recording = record(config, study.examples, outputs.device)
    errors = attention_errors(study, members, recording.heads, outputs.seed)
    floor = _floor(study, recording.heads)
    outputs.frame("error", errors.assign(run_id=recording.run_id))
    slopes = {
        variant: _slope(rows, study.slope_from, study.bootstrap, outputs.seed)
        for variant, rows in errors.groupby(["estimator", "key_shift"])
    }
    outputs.table("error_by_width", _table(errors, floor, slopes, study, recording))
    outputs.figure("error", _figure(errors, floor, list(members), recording))
    outputs.verdict(_slope_verdict(slopes, study, recording))
    for verdict in _order_verdicts(errors, study, outputs.seed):
        outputs.verdict(verdict)


def attention_errors(
    study: DictConfig, members: Mapping[str, DictConfig], heads: Sequence[Head], seed: int
) -> pd.DataFrame:
    """error: |out - exact|^2 / |exact|^2 over one head's tokens; one row per head, example, width, draw, variant."""
    head_dim = heads[0].q.shape[-1]
    shape = instantiate(study.shape)(num_heads=study.draws, head_dim=head_dim)
    exact = instantiate(study.exact)(shape, torch.Generator()).double().eval()
    rows = []
    for name, shifted, node in variants(members):
        for width in study.num_features:
            mechanism = build(node, shape, num_features=width, seed=seed, key_shift=shifted)
            for head in heads:
                for draw, error in enumerate(_errors(mechanism, exact, head, study.draws)):
                    rows.append((head.place, head.example, name, shifted, width, draw, error))
    columns = ["place", "example", "estimator", "key_shift", "num_features", "draw", "error"]
    return pd.DataFrame(rows, columns=columns).assign(seed=seed)


@torch.no_grad()
def _errors(mechanism: nn.Module, exact: nn.Module, head: Head, draws: int) -> list[float]:
    q, k, v = (x.expand(1, draws, -1, -1) for x in (head.q, head.k, head.v))  # [1, draws, L, D]
    truth: Tensor = exact(q[:, :1], k[:, :1], v[:, :1], None)
    gap = (mechanism(q, k, v, None) - truth).square().sum(dim=(-2, -1))[0]
    return (gap / truth.square().sum()).tolist()


def _floor(study: DictConfig, heads: Sequence[Head]) -> pd.Series:
    """The error of a mechanism that never looks at q and k, by place."""
    shape = instantiate(study.shape)(num_heads=1, head_dim=heads[0].q.shape[-1])
    exact, floor = (instantiate(node)(shape, torch.Generator()).double().eval() for node in (study.exact, study.floor))
    rows = [(head.place, _errors(floor, exact, head, 1)[0]) for head in heads]
    return pd.DataFrame(rows, columns=["place", "error"]).groupby("place")["error"].mean()


def _cube(rows: pd.DataFrame, least: int) -> tuple[np.ndarray, np.ndarray]:
    """Widths from `least` on, and errors [widths, heads, draws]."""
    wide = rows[rows["num_features"] >= least].pivot_table(
        index=["num_features", "place", "example"], columns="draw", values="error"
    )
    widths = np.unique(wide.index.get_level_values("num_features"))
    return widths, wide.to_numpy().reshape(len(widths), -1, wide.shape[1])


def _slope(rows: pd.DataFrame, least: int, rounds: int, seed: int) -> tuple[float, tuple[float, float]]:
    """d log MSE / d log F, log MSE averaged over heads and examples; interval by bootstrap over draws."""
    widths, errors = _cube(rows, least)

    def slope(draws: np.ndarray) -> float:
        return float(np.polyfit(np.log(widths), np.log(errors[:, :, draws].mean(axis=-1)).mean(axis=-1), 1)[0])

    return _bootstrap(slope, errors.shape[-1], rounds, seed)


def _bootstrap(
    statistic: Callable[[np.ndarray], float], draws: int, rounds: int, seed: int
) -> tuple[float, tuple[float, float]]:
    numbers = np.random.Generator(np.random.PCG64(seed))
    found = [statistic(numbers.integers(0, draws, draws)) for _ in range(rounds)]
    low, high = np.quantile(found, [0.025, 0.975])
    return statistic(np.arange(draws)), (float(low), float(high))


def _slope_verdict(slopes: Mapping, study: DictConfig, recording: Recording) -> Verdict:
    unshifted = {name: slopes[(name, False)] for name in study.order if (name, False) in slopes}
    holds = [name for name, (_, (low, high)) in unshifted.items() if low <= -0.9 and high >= -1.1]
    status = "reproduced" if len(holds) == len(unshifted) else "reproduced under conditions"
    name = study.claimed_order[-1]
    number, interval = unshifted[name]
    listed = ", ".join(f"{other} {value:.2f}" for other, (value, _) in unshifted.items())
    return Verdict(
        f"attention MSE falls as 1/F, log-log slope of {name} for F >= {study.slope_from}",
        status if holds else "not reproduced",
        number, interval, f"{recording.source}; -1 within 0.1 for {len(holds)} of {len(unshifted)}: {listed}",
    )  # fmt: skip


def _order_verdicts(errors: pd.DataFrame, study: DictConfig, seed: int) -> list[Verdict]:
    """Neighbours in the claimed order, and the best of them with the key shift: ratios of geometric mean errors."""
    at = errors[errors["num_features"] == study.compare_at]
    cubes = {variant: _cube(rows, 0)[1][0] for variant, rows in at.groupby(["estimator", "key_shift"])}

    def ratio(worse: tuple[str, bool], better: tuple[str, bool]) -> tuple[float, tuple[float, float]]:
        def statistic(draws: np.ndarray) -> float:
            logs = [np.log(cubes[variant][:, draws].mean(axis=-1)).mean() for variant in (better, worse)]
            return float(np.exp(logs[0] - logs[1]))

        return _bootstrap(statistic, study.draws, study.bootstrap, seed)

    pairs = [((a, False), (b, False)) for a, b in zip(study.claimed_order, study.claimed_order[1:], strict=False)]
    pairs.append(((study.claimed_order[-1], False), (study.claimed_order[-1], True)))
    verdicts = []
    for worse, better in pairs:
        number, interval = ratio(worse, better)
        status = "reproduced" if interval[1] < 1 else "not reproduced"
        names = [name + (" with shifted keys" if shifted else "") for name, shifted in (better, worse)]
        verdicts.append(
            Verdict(
                f"{names[0]} has a smaller attention error than {names[1]}, ratio of MSE at F = {study.compare_at}",
                status, number, interval,
                "geometric mean over heads and examples" + ("" if interval[0] <= 1 else "; significantly larger"),
            )
        )  # fmt: skip
    return verdicts


def _table(errors: pd.DataFrame, floor: pd.Series, slopes: Mapping, study: DictConfig, recording: Recording) -> Table:
    mse = errors.groupby(["estimator", "key_shift", "num_features", "place", "example"])["error"].mean()
    mean = np.exp(np.log(mse).groupby(level=["estimator", "key_shift", "num_features"]).mean())
    cells = {}
    for name in study.order:
        for shifted in (False, True):
            if (name, shifted) not in slopes:
                continue
            row = {f"F = {width}": f"{mean[(name, shifted, width)]:.2g}" for width in study.num_features}
            value, (low, high) = slopes[(name, shifted)]
            row["slope"] = f"{value:.2f} [{low:.2f}, {high:.2f}]"
            cells[name + (", keys shifted" if shifted else "")] = row
    return Table(
        "Relative squared error of the attention output, geometric mean over heads and examples",
        pd.DataFrame.from_dict(cells, orient="index"),
        (
            recording.source,
            f"{study.draws} draws of the features; slope of log error over log F for F >= {study.slope_from}, 95 %",
            f"mean pooling, which ignores q and k: {float(np.exp(np.log(floor).mean())):.2g}",
        ),
    )


def _figure(errors: pd.DataFrame, floor: pd.Series, names: Sequence[str], recording: Recording) -> Figure:
    """One panel per head: mean over draws and examples; the bands (keys as they are) hold 95 % of the draws' means."""
    places = list(dict.fromkeys(errors["place"]))
    columns = min(2, len(places))
    figure, axes = plt.subplots(
        -(-len(places) // columns), columns, figsize=(9.2, 3.5 * -(-len(places) // columns)), sharex=True, squeeze=False
    )
    for panel, place in zip(axes.flat, places, strict=False):
        part = errors[errors["place"] == place]
        for (name, shifted), rows in part.groupby(["estimator", "key_shift"]):
            style = STYLES[name]
            by_draw = rows.groupby(["num_features", "draw"])["error"].mean().unstack("draw")
            mean = by_draw.mean(axis=1)
            panel.plot(
                mean.index, mean, color=style.color, marker=style.marker, markersize=style.size, linewidth=1.1,
                linestyle="--" if shifted else "-", zorder=style.layer,
            )  # fmt: skip
            if not shifted:
                low, high = by_draw.quantile(0.025, axis=1), by_draw.quantile(0.975, axis=1)
                panel.fill_between(mean.index, low, high, color=style.color, alpha=0.1, linewidth=0)
        panel.axhline(floor[place], color="0.4", linewidth=1, linestyle=":")
        widths = np.array(sorted(set(errors["num_features"])))
        panel.plot(widths, 0.5 * floor[place] * widths[0] / widths, color="0.7", linewidth=2.5, zorder=0)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_title(place, fontsize=9)
        panel.set_xticks(widths, [str(width) for width in widths])
        panel.grid(color="0.92")
        panel.tick_params(labelsize=8)
    for panel in axes[-1]:
        panel.set_xlabel("number of features F", fontsize=9)
    for panel in axes[:, 0]:
        panel.set_ylabel("relative squared error of the output", fontsize=9)
    handles = legend_handles(names, shifted=True)
    handles += [
        plt.Line2D([], [], color="0.4", linestyle=":", label="mean pooling"),
        plt.Line2D([], [], color="0.7", linewidth=2.5, label="slope -1"),
    ]
    figure.suptitle(recording.source, fontsize=9)
    figure.legend(handles=handles, loc="lower center", ncols=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    return figure
