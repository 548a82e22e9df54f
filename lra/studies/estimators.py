"""Owns how the studies of random features get their estimators from conf/attention, and how they draw and bound them.

Legend: L length, D head_dim, F num_features (the width of phi), H independent draws, one per head.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import instantiate
from matplotlib.lines import Line2D
from omegaconf import DictConfig, OmegaConf
from scipy import stats
from torch import Tensor, nn


class Style(NamedTuple):
    color: str
    marker: str
    size: float = 4.0
    layer: int = 2  # the higher, the further in front: where two estimators agree both must stay visible


# one look per estimator in all figures: Okabe and Ito's colours, which every kind of colour vision tells apart
STYLES = {
    "TrigRF": Style("#000000", "x", 5.0, 4),
    "PosRF": Style("#D55E00", "s"),
    "OPRF": Style("#E69F00", "^"),
    "SADERF": Style("#56B4E9", "D", 6.0),
    "ADERF": Style("#0072B2", "v"),
    "SDERF": Style("#009E73", "o"),
    "DIAG": Style("#CC79A7", "P"),
    "FULL": Style("#882255", "*"),
}


def members_of(config: DictConfig, *required: str) -> dict[str, DictConfig]:
    """The nodes of `study.members`, in the order of `study.order`, each a whole file of conf/attention.

    Raises:
        ValueError: unknown names in `study.order`, or a `required` one missing from it.
    """
    order, known = list(config.study.order), [name for name in STYLES if name in config.study.members]
    unknown, missing = sorted(set(order) - set(known)), [name for name in required if name not in order]
    if unknown:
        raise ValueError(f"study.order names {', '.join(unknown)}; choose from {', '.join(known)}")
    if missing:
        raise ValueError(
            f"study.order lacks {', '.join(missing)}, which the study's claims are about; add what is missing"
        )
    return {name: config.study.members[name] for name in order}


def check_listed(study: DictConfig, key: str, values: str) -> None:
    """Raise ValueError unless the number at `key` is one of those listed at `values`."""
    if study[key] not in study[values]:
        raise ValueError(
            f"study.{key}={study[key]} is not in study.{values}={list(study[values])}; add it, or change it"
        )


def check_draws(study: DictConfig, *keys: str) -> None:
    """Raise ValueError for a number of draws that gives no interval."""
    for key in keys:
        if OmegaConf.select(study, key) < 2:
            raise ValueError(f"study.{key}={OmegaConf.select(study, key)} gives no interval; take 2 at least")


def build(
    node: DictConfig,
    shape: Any,
    *,
    num_features: int,
    seed: int,
    projection: DictConfig | None = None,
    key_shift: bool | None = None,
) -> nn.Module:
    """The mechanism of a node in float64, with an independent projection for each head of the HeadShape `shape`.

    `num_features` is the width of phi: maps with two features per row (cosine and sine) get half as many rows.
    `projection` and `key_shift` replace the node's own; None keeps them.
    """
    node = OmegaConf.create(OmegaConf.to_container(node, resolve=True))
    changes: dict[str, Any] = {"num_features": num_features, "per_head": True}
    if key_shift is not None and has_key_shift(node):
        changes["key_shift"] = key_shift
    if projection is not None:
        changes["projection"] = OmegaConf.to_container(projection, resolve=True)
    node.feature_map.update(changes)
    mechanism = _instantiate(node, shape, seed)
    width = mechanism.feature_map.num_outputs
    if width != num_features:
        assert width == 2 * num_features, "a row gives one feature or two"
        if num_features % 2:
            raise ValueError(f"{type(mechanism.feature_map).__name__} makes features in pairs: {num_features} is odd")
        node.feature_map.num_features = num_features // 2
        mechanism = _instantiate(node, shape, seed)
    return mechanism


def has_key_shift(node: DictConfig) -> bool:
    return "key_shift" in node.feature_map or "a_structure" in node.feature_map


def _instantiate(node: DictConfig, shape: Any, seed: int) -> nn.Module:
    return instantiate(node)(shape, torch.Generator().manual_seed(seed)).double().eval()


def paired(x: Tensor, y: Tensor, num_shifts: int) -> tuple[Tensor, Tensor]:
    """x, y [L, D] -> [S, L, D] each: all pairs (i, i + s) for S shifts s spread over the L of them.

    Every token takes part equally often, so that a mean over these pairs has the noise of the cross terms only.
    """
    length = min(len(x), len(y))
    shifts = np.unique(np.linspace(0, length, min(num_shifts, length), endpoint=False).astype(int))
    index = (torch.arange(length) + torch.as_tensor(shifts)[:, None]) % length  # [S, L]
    return x[:length].expand(len(shifts), -1, -1), y[index]


class LogVariance(NamedTuple):
    """Means over pairs, of one feature: log Var[f(x) f(y)], and log Var - 2 log K, the relative variance."""

    absolute: float
    relative: float


def log_variance(mechanism: nn.Module, x: Tensor, y: Tensor, num_shifts: int) -> LogVariance:
    """In closed form, fitted to these x, y [L, D] (scaled already) where the map is fitted at all.

    Raises:
        ValueError: a second moment beyond the range of float64.
    """
    features = mechanism.feature_map
    fitted = (features.prepare_scaled(x, y),) if hasattr(features, "prepare_scaled") else ()
    x_pairs, y_pairs = paired(x, y, num_shifts)
    k = features.kernel(x_pairs, y_pairs, *fitted)
    # (E f^2 - K^2) / K^2; at z = 0 the variance is 0, and rounding decides the sign
    excess = (features.second_moment(x_pairs, y_pairs, *fitted) / k.square() - 1).clamp_min(torch.finfo(k.dtype).eps)
    if not bool(excess.isfinite().all()):
        raise ValueError(
            "the variance of a random feature exceeds 1e308 on these queries and keys; lower study.sigmas, or the "
            "scale of the recorded ones"
        )
    relative = excess.log()
    return LogVariance(float((relative + 2 * k.log()).mean()), float(relative.mean()))


def variants(members: Mapping[str, DictConfig]) -> Iterator[tuple[str, bool, DictConfig]]:
    """(name, key shift, node): each estimator without the key shift, then with it where it can have one."""
    for name, node in members.items():
        for shifted in (False, True) if has_key_shift(node) else (False,):
            yield name, shifted, node


def student_interval(values: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """The mean of independent draws and its 95 % interval by Student's t, for few draws as well."""
    draws = np.asarray(values, dtype=float)
    half = float(stats.t.ppf(0.975, len(draws) - 1) * stats.sem(draws)) if len(draws) > 1 else float("nan")
    return float(draws.mean()), (float(draws.mean() - half), float(draws.mean() + half))


def legend_handles(names: Sequence[str], shifted: bool) -> list[Line2D]:
    """One handle per estimator, and with `shifted` two grey ones that tell full lines from dashed ones."""
    handles = [
        Line2D([], [], color=STYLES[name].color, marker=STYLES[name].marker, markersize=5, label=name) for name in names
    ]
    if shifted:
        handles += [
            Line2D([], [], color="0.4", label="keys as they are"),
            Line2D([], [], color="0.4", linestyle="--", label="keys shifted"),
        ]
    return handles
