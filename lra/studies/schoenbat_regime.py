"""Owns when random Maclaurin features keep the signal of attention: error over radius, dimension, anisotropy, width.

The signal is what attention adds to mean pooling, exact output minus mean of the values.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig

from lra.studies.mechanisms import Catalogue, bootstrap, gaussian_inputs, signal_error
from lra.studies.runner import Verdict


@torch.no_grad()
def regime(study: DictConfig, catalogue: Catalogue, seed: int) -> pd.DataFrame:
    """One row per condition, kernel, estimator and draw. Each draw is a new set of inputs and of features."""
    rows = []
    base = {"tau": 1.0, "head_dim": study.head_dim, "common": 0.0, "decay": 0.0, "tied_values": False}
    for axis, values in study.regime.axes.items():
        for value in values:
            condition = {**base, axis: value}
            for kernel in study.regime.kernels:
                if kernel != "exp" and condition["tau"] >= condition["head_dim"] ** 0.5:
                    continue  # outside of the kernel's domain: there is nothing to approximate
                for draw in range(study.regime.draws):
                    found = _errors(study, catalogue, kernel, condition, seed + draw)
                    rows += [{"axis": axis, "kernel": kernel, **condition, "draw": draw, **row} for row in found]
    return pd.DataFrame(rows)


def _errors(
    study: DictConfig, catalogue: Catalogue, kernel: str, condition: dict[str, Any], seed: int
) -> list[dict[str, Any]]:
    head_dim, length = int(condition["head_dim"]), int(study.regime.length)
    kinds = {name: condition[name] for name in ("common", "decay", "tied_values")}
    data = gaussian_inputs(length, head_dim, seed, **kinds)
    settings = {"head_dim": head_dim, "max_len": length, "seed": seed}
    tau = {"temperature.value": float(condition["tau"])}
    exact = catalogue.build(f"kernelized_{kernel}", values=tau, **settings)(data.q, data.k, data.v)
    mean = data.v.mean(dim=-2, keepdim=True)
    signal = float((exact - mean).norm() / (data.v - mean).norm())
    rows = []
    for estimator in study.regime.estimators:
        width = 1 + head_dim if estimator.exact_only else study.num_features
        if not estimator.exact_only and width <= 1 + head_dim and estimator.exact_degree == 1:
            continue  # the exact part alone takes all of the features
        values = {**tau, "feature_map.num_features": width}
        attention = catalogue.build(f"{estimator.attention}_{kernel}", estimator.overrides, values, **settings)
        error = signal_error(attention(data.q, data.k, data.v), exact, data.v)
        rows.append({"estimator": estimator.name, "num_features": width, "error": error, "signal": signal})
    return rows


def summary(frame: pd.DataFrame, seed: int) -> pd.DataFrame:
    """Median over draws with its 95 % interval, one row per condition and estimator."""
    keys = ["axis", "kernel", "tau", "head_dim", "common", "decay", "tied_values", "estimator", "num_features"]
    rows = []
    for key, group in frame.groupby(keys, sort=False):
        middle, low, high = bootstrap(group["error"].to_numpy(), lambda x: float(np.median(x)), seed)
        rows.append({
            **dict(zip(keys, key, strict=True)), "error": middle, "low": low, "high": high,
            "signal": group["signal"].median(),
        })  # fmt: skip
    return pd.DataFrame(rows)
