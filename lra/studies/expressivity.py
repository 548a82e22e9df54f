"""Owns the study of polynomial expressivity: which attention separates two sets that differ in one token, 2310.20051.

Legend: n tokens, d = copies + 2 channels, m readout signs, T distinct tokens.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from scipy import stats
from torch import Tensor, nn

from lra.studies.expressivity_figures import separation_figure, temperature_figure, training_figure
from lra.studies.expressivity_training import num_signs, train_all
from lra.studies.expressivity_verdicts import separation_table, training_table, verdicts
from lra.studies.runner import Outputs


def run(config: DictConfig, outputs: Outputs) -> None:
    """The fixed network with every mechanism, the closed form beside it, and the trained layer."""
    study = config.study
    frame = pd.concat(
        [separation(study, name, length, outputs.seed) for name in study.mechanisms for length in study.lengths],
        ignore_index=True,
    )
    outputs.frame("separation", frame)
    closed = closed_form(study)
    outputs.frame("closed_form", closed)
    trained = train_all(study, outputs.seed)
    outputs.frame("trained", trained)
    outputs.table("separation_by_setting", separation_table(frame, closed, study))
    outputs.table("trained_accuracy", training_table(trained, study))
    outputs.figure("separation", separation_figure(frame, closed, study))
    outputs.figure("temperature", temperature_figure(frame, study))
    outputs.figure("trained", training_figure(trained, closed, study))
    for verdict in verdicts(frame, closed, trained, study):
        outputs.verdict(verdict)


def copies_of(length: int) -> int:
    """t of n = (d - 2) t, with as many blocks as copies of each."""
    copies = math.isqrt(length)
    if copies**2 != length:
        raise ValueError(f"study.lengths holds {length}, which is no square: the construction needs n = copies^2")
    return copies


def tokens(length: int, feature: float, data: DictConfig, place: int) -> Tensor:
    """A [n, d] float64: column 0 holds the feature at one place, then copies of b I, the last column is c."""
    copies = copies_of(length)
    x = torch.zeros(length, copies + 2, dtype=torch.float64)
    x[place, 0] = feature
    x[:, 1:-1] = data.block * torch.eye(copies, dtype=torch.float64).repeat(copies, 1)
    x[:, -1] = data.constant
    return x


def fires(outputs: Tensor, signs: Tensor, threshold: float) -> Tensor:
    """sum_i sum_l max(<C_i, y_l> - tau, 0) > 0 for C [.., T, d], y [.., d, m] -> [..]."""
    return (outputs @ signs).amax(dim=(-2, -1)) > threshold


class Setting(NamedTuple):
    """One cell of a sweep: a degree or a temperature; both NaN: the mechanism as it is."""

    degree: float
    temperature: float


def settings_of(entry: DictConfig) -> list[Setting]:
    if "degrees" in entry:
        return [Setting(float(degree), math.nan) for degree in entry.degrees]
    return [Setting(math.nan, math.nan if value is None else float(value)) for value in entry.temperatures]


def mechanism_of(entry: DictConfig, setting: Setting, shape: Any, seed: int) -> tuple[nn.Module, float]:
    """The mechanism at a setting, and the factor of its queries."""
    node = OmegaConf.create(OmegaConf.to_container(entry.attention, resolve=True))
    factor = 1.0
    if not math.isnan(setting.degree):
        OmegaConf.update(node, entry.degree_key, int(setting.degree))
        if setting.degree == 2 and "feature_map" in node:
            node.feature_map.sketch_dim = None  # degree 2 is exact, it has no sketch
    elif not math.isnan(setting.temperature):
        value = setting.temperature * shape.head_dim**0.5  # undoes the mechanism's own 1/sqrt(d)
        if entry.temperature_key is None:
            factor = value
        else:
            OmegaConf.update(node, entry.temperature_key, value)
    return instantiate(node)(shape, torch.Generator().manual_seed(seed)).double().eval(), factor


def distinct(length: int, place: int) -> Tensor:
    """Indices of one token of each kind, the feature's first: equal tokens have equal outputs."""
    copies = copies_of(length)
    others = [block + copies if block == place else block for block in range(copies)]
    return torch.tensor([place, *others])


@torch.no_grad()
def separation(study: DictConfig, name: str, length: int, seed: int) -> pd.DataFrame:
    """One row per setting, set (0 or 1) and draw of the mechanism: the share of readouts that fire, and the weight of
    the feature's token on itself. All settings see the same places and signs."""
    entry = study.mechanisms[name]
    shape = instantiate(study.shape)(head_dim=copies_of(length) + 2, max_len=length)
    made: dict[Setting, tuple[nn.Module, float]] = {}
    rows = []
    for draw in range(study.draws):
        numbers = np.random.Generator(np.random.PCG64([seed, length, draw]))
        place = int(numbers.integers(length))
        size = (study.sign_draws, shape.head_dim, num_signs(length, study.readout))
        signs = torch.from_numpy(numbers.choice([-1.0, 1.0], size))
        kinds = distinct(length, place)
        for setting in settings_of(entry):
            if draw == 0 or entry.random:
                made[setting] = mechanism_of(entry, setting, shape, seed + draw)
            mechanism, factor = made[setting]
            for kind, feature in enumerate((study.data.small, study.data.large)):
                x = tokens(length, feature, study.data, place)
                c = mechanism(factor * x[None, None, kinds], x[None, None], x[None, None], None)[0, 0]  # [T, d]
                share = float(fires(c, signs, study.threshold).double().mean())
                rows.append((name, length, *setting, kind, draw, share, float(c[0, 0]) / feature))
    columns = ["mechanism", "length", "degree", "temperature", "set", "draw", "fires", "own_weight"]
    return pd.DataFrame(rows, columns=columns).assign(seed=seed)


def closed_form(study: DictConfig) -> pd.DataFrame:
    """Probability that exact polynomial attention fires, over the degree as a real number, for both sets."""
    rows = []
    for length in study.lengths:
        for degree in np.arange(1.0, 10.01, 0.25):
            for kind, feature in enumerate((study.data.small, study.data.large)):
                rows.append((length, degree, kind, *firing_probability(length, degree, feature, study)))
    return pd.DataFrame(rows, columns=["length", "degree", "set", "fires", "own_weight"])


def firing_probability(length: int, degree: float, feature: float, study: DictConfig) -> tuple[float, float]:
    """P[the feature's row fires], w: exact over the m random signs. No other row can reach tau above b + c + a / copies.

    <C_j, y> = w a y_0 + b o y_own + c y_last + b r (sum of the other blocks' signs), with w the weight of the token on
    itself, o the mass of its own block and r the mass of each other block.
    """
    copies, data = copies_of(length), study.data
    g = feature**2 + data.block**2 + data.constant**2
    same, other = ((data.block**2 + data.constant**2) / g) ** degree, (data.constant**2 / g) ** degree
    w = 1 / (1 + (copies - 1) * same + (length - copies) * other)
    own, rest = (1 + (copies - 1) * same) * w, copies * other * w
    probability = 0.0
    for signs in np.ndindex(2, 2, 2):
        base = sum(
            (2 * sign - 1) * part
            for sign, part in zip(signs, (w * feature, data.block * own, data.constant), strict=True)
        )
        # base + b rest (2 K - (copies - 1)) > tau, K binomial
        least = ((study.threshold - base) / (data.block * rest) + copies - 1) / 2
        probability += float(stats.binom.sf(math.floor(least + 1e-9), copies - 1, 0.5)) / 8
    return -math.expm1(num_signs(length, study.readout) * math.log1p(-probability)), w
