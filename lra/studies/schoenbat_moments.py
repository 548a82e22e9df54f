"""Owns the statistics of one Maclaurin feature: mean, variance and tail against their closed forms (arXiv 2505.12252).

Legend: P pairs of a query and a key, R single-feature estimates.
"""

import math

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from scipy.stats import norm
from torch import Tensor, nn

from lra.studies.mechanisms import Catalogue, gaussian_inputs
from lra.studies.runner import Verdict

FALSE_ALARM = 0.05  # of the simultaneous tests, all together


def single_features(map_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """R independent estimates [P, R] of K(x.y / sqrt(D)) by one random feature each, from pairs x, y [P, D]."""
    num_pairs = len(x)
    phi = map_(torch.cat([x, y])[None, None], False).values[0, 0]  # [2P, R + 1]: random features first, constant last
    products = phi[:num_pairs] * phi[num_pairs:]
    return products[:, :-1] * (phi.shape[-1] - 1) + products[:, -1:]


@torch.no_grad()
def moments(study: DictConfig, catalogue: Catalogue, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per kernel and pair: mean and variance of one feature, measured and closed form; and the tail of the
    estimate by the published number of features."""
    rows, tails = [], []
    data = gaussian_inputs(study.num_pairs, study.head_dim, seed)
    for place, kernel in enumerate(study.kernels):
        values = {"feature_map.num_features": study.num_samples + 1}
        attention = catalogue.build(
            f"schoenbat_{kernel}", values=values, head_dim=study.head_dim, max_len=study.num_pairs, seed=seed + place
        )
        x, y = (z[0, 0].double() for z in attention.regularize(data.q.double(), data.k.double(), None))
        y[0] = x[0]  # the pair of largest variance: a query that is its own key
        map_, scale = attention.linear.feature_map, study.head_dim**-0.25
        samples = single_features(map_, x, y).numpy()
        mean = map_.kernel(x * scale, y * scale).numpy()
        exact = map_.dot_kernel.exact((x * y).sum(dim=-1) * scale**2).numpy()
        random_mean = mean - map_.dot_kernel.coefficient(0)
        variance = map_.second_moment(x * scale, y * scale).numpy() - random_mean**2
        for pair in range(study.num_pairs):
            rows.append(_row(kernel, pair, samples[pair], mean[pair], variance[pair], exact[pair]))
        tails += _tail(study, kernel, map_, samples[-1], mean[-1], variance[-1], x[-1] * scale, y[-1] * scale)
    return pd.DataFrame(rows), pd.DataFrame(tails)


def _row(kernel: str, pair: int, samples: np.ndarray, mean: float, variance: float, exact: float) -> dict[str, object]:
    count = len(samples)
    measured = samples.var(ddof=1)
    kurtosis = ((samples - samples.mean()) ** 4).mean() / measured**2
    return {
        "kernel": kernel, "pair": pair, "samples": count, "exact": exact, "truncated_series": mean,
        "mean": samples.mean(), "mean_error": math.sqrt(variance / count),
        "variance": measured, "variance_closed_form": variance,
        "variance_ratio": measured / variance, "variance_ratio_error": math.sqrt((kurtosis - 1) / count),
    }  # fmt: skip


def _tail(
    study: DictConfig, kernel: str, map_: nn.Module, samples: np.ndarray, mean: float, variance: float,
    x: Tensor, y: Tensor,
) -> list[dict[str, object]]:  # fmt: skip
    """P(|estimate - K| >= epsilon) for estimates by F - 1 random features, and its bounds by Chebyshev and Hoeffding."""
    size = study.num_features - 1
    draws = len(samples) // size
    errors = np.abs(samples[: draws * size].reshape(draws, size).mean(axis=1) - mean)
    largest = largest_feature(map_, x, y)
    rows = []
    for epsilon in np.geomspace(study.tail.smallest, study.tail.largest, study.tail.steps):
        rows.append({
            "kernel": kernel, "epsilon": epsilon, "draws": draws, "exceeding": int((errors >= epsilon).sum()),
            "measured": (errors >= epsilon).mean(),
            "chebyshev": min(1.0, variance / size / epsilon**2),
            "hoeffding": min(1.0, 2 * math.exp(-size * epsilon**2 / (2 * largest**2))),
            "features_measured": size * (np.quantile(errors, 0.95) / study.tail.precision) ** 2,
            "features_hoeffding": 2 * largest**2 * math.log(2 / 0.05) / study.tail.precision**2,
        })  # fmt: skip
    return rows


def largest_feature(map_: nn.Module, x: Tensor, y: Tensor) -> float:
    """C = max_n a_n (|x|_1 |y|_1)^n / P(n), which bounds a single-feature estimate of the random part."""
    radius = float(x.abs().sum() * y.abs().sum())
    total = sum(map_.law.expected.values())
    return max(map_.dot_kernel.coefficient(n) * radius**n * total / mean for n, mean in map_.law.expected.items())


def moment_verdicts(frame: pd.DataFrame) -> list[Verdict]:
    limit = float(norm.isf(FALSE_ALARM / 2 / len(frame)))
    bias = frame["mean"] - frame["truncated_series"]
    worst = (bias / frame["mean_error"]).abs().idxmax()
    unbiased = bool((bias.abs() <= limit * frame["mean_error"]).all())
    truncation = (frame["truncated_series"] - frame["exact"]).abs().max()
    spread = (frame["variance_ratio"] - 1) / frame["variance_ratio_error"]
    off = spread.abs().idxmax()
    exact_variance = bool((spread.abs() <= limit).all())
    ratio, half = frame["variance_ratio"][off], limit * frame["variance_ratio_error"][off]
    tests = f"{len(frame)} tests of kernel and pair, {int(frame['samples'].iloc[0]):,} features each"
    return [
        Verdict(
            "The kernel estimate is unbiased; largest bias, of a kernel near 1",
            "reproduced" if unbiased else "not reproduced",
            float(bias[worst]),
            (float(bias[worst] - limit * frame["mean_error"][worst]), float(bias[worst] + limit * frame["mean_error"][worst])),
            f"{tests}; the interval is simultaneous; degrees above 20, left out by the released code, are worth {truncation:.1g}",
            figure="moments",
        ),
        Verdict(
            "The variance of one feature is its closed form; ratio furthest from 1",
            "reproduced" if exact_variance else "not reproduced",
            float(ratio),
            (float(ratio - half), float(ratio + half)),
            f"{tests}; the interval is simultaneous",
            figure="moments",
        ),
    ]  # fmt: skip


def bound_verdict(tail: pd.DataFrame, study: DictConfig) -> Verdict:
    """The bound holds when no measured frequency lies above it by more than chance allows."""
    noise = np.sqrt(tail["hoeffding"] * (1 - tail["hoeffding"]) / tail["draws"])
    holds = bool((tail["measured"] <= tail["hoeffding"] + 4 * noise).all())
    loose = tail.groupby("kernel")[["features_measured", "features_hoeffding"]].first()
    factors = loose["features_hoeffding"] / loose["features_measured"]
    return Verdict(
        "The concentration bound holds, but asks for more features than needed; smallest factor over the kernels",
        "reproduced under conditions" if holds else "not reproduced",
        float(factors.min()),
        (float(factors.min()), float(factors.max())),
        f"as a bound it is never exceeded; for an error of {study.tail.precision} in 95 % of draws it asks for "
        f"{loose['features_hoeffding'].min():.1e} features where {loose['features_measured'].max():.0f} do: of no use "
        "to choose F; the range is over kernels",
        figure="concentration",
    )


@torch.no_grad()
def estimator_bias(study: DictConfig, catalogue: Catalogue, seed: int) -> pd.DataFrame:
    """Mean and variance of whole estimates over draws, for every unbiased estimator of the study: a row per pair."""
    rows = []
    data = gaussian_inputs(study.num_pairs, study.head_dim, seed)
    scale = study.head_dim**-0.25
    for estimator in study.estimators:
        if not estimator.unbiased:
            continue
        values = {"feature_map.num_features": study.num_features + estimator.extra}
        estimates = []
        for draw in range(study.bias_draws):
            attention = catalogue.build(
                f"{estimator.attention}_exp", estimator.overrides, values,
                head_dim=study.head_dim, max_len=study.num_pairs, seed=seed + draw,
            )  # fmt: skip
            x, y = attention.regularize(data.q.double(), data.k.double(), None)
            phi_x, phi_y = attention.linear.features(x, y, None)
            estimates.append((phi_x * phi_y).sum(dim=-1)[0, 0].numpy())
        drawn, map_ = np.stack(estimates), attention.linear.feature_map
        exact = map_.kernel(x * scale, y * scale)[0, 0].numpy()
        closed = map_.variance(x * scale, y * scale)[0, 0].numpy()
        rows += [
            {"estimator": estimator.name, **_row("exp", pair, drawn[:, pair], exact[pair], closed[pair], exact[pair])}
            for pair in range(study.num_pairs)
        ]
    return pd.DataFrame(rows)


def estimator_verdict(frame: pd.DataFrame) -> Verdict:
    """Means and variances of whole estimates against their closed forms, for every estimator and pair at once."""
    limit = float(norm.isf(FALSE_ALARM / 4 / len(frame)))  # means and variances: twice as many tests
    bias = frame["mean"] - frame["truncated_series"]
    worst = (bias / frame["mean_error"]).abs().idxmax()
    unbiased = bool((bias.abs() <= limit * frame["mean_error"]).all())
    spread = frame["variance_ratio"].map(math.log).abs() / frame["variance_ratio_error"]
    half = limit * frame["mean_error"][worst]
    ratios = frame["variance_ratio"]
    return Verdict(
        "The estimators beyond the published one are unbiased, with the variances of their closed forms; largest bias",
        "reproduced" if unbiased and bool((spread <= limit).all()) else "not reproduced",
        float(bias[worst]),
        (float(bias[worst] - half), float(bias[worst] + half)),
        f"{'; '.join(frame['estimator'].unique())}: {int(frame['samples'].iloc[0])} draws each, e^t; the interval is "
        f"simultaneous; measured over closed-form variance {ratios.min():.2f} to {ratios.max():.2f}",
        figure="moments",
    )
