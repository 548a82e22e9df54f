"""Owns the small data sets of the kernel-regression study: scikit-learn's bundled ones, and an anisotropic mixture."""

from dataclasses import dataclass

import numpy as np
import torch
from omegaconf import DictConfig
from sklearn import datasets
from torch import Tensor

_BUNDLED = {
    "iris": datasets.load_iris,
    "wine": datasets.load_wine,
    "breast_cancer": datasets.load_breast_cancer,
    "digits": datasets.load_digits,
    "diabetes": datasets.load_diabetes,
}
_REGRESSION = ("diabetes",)


@dataclass(frozen=True)
class Part:
    x: Tensor  # [N, D] float64
    targets: Tensor  # [N, C]: one-hot labels, or the number to predict [N, 1]


@dataclass(frozen=True)
class Tabular:
    name: str
    regression: bool
    train: Part
    val: Part
    test: Part


def load(name: str, study: DictConfig, seed: int) -> Tabular:
    """Split at random. Bundled sets: each feature standardised on the training part. The mixture keeps its offset and
    its covariances: one factor makes its mean squared entry about its mean 1.

    Raises:
        ValueError: a set that is not known.
    """
    numbers = np.random.Generator(np.random.PCG64([seed, *name.encode()]))
    if name.startswith("mixture_") and name.removeprefix("mixture_").isdigit():
        x, y = _mixture(int(name.removeprefix("mixture_")), study.mixture, numbers)
    elif name in _BUNDLED:
        found = _BUNDLED[name]()
        x, y = found.data.astype(float), found.target
    else:
        raise ValueError(f"unknown set {name!r} in study.sets; choose from {', '.join(_BUNDLED)}, mixture_<dimension>")
    regression = name in _REGRESSION
    order = numbers.permutation(len(x))
    first, second = int(study.split.train * len(x)), int((study.split.train + study.split.val) * len(x))
    train, val, test = order[:first][: study.most_train], order[first:second], order[second:][: study.most_test]
    centre, scale = x[train].mean(axis=0), x[train].std(axis=0)
    if name.startswith("mixture_"):
        centre, scale = 0.0, np.sqrt((scale**2).mean())
    x = (x - centre) / np.where(scale > 0, scale, 1.0)
    targets = y[:, None].astype(float) if regression else np.eye(int(y.max()) + 1)[y]
    parts = (Part(torch.from_numpy(x[rows]), torch.from_numpy(targets[rows])) for rows in (train, val, test))
    return Tabular(name, regression, *parts)


def _mixture(dim: int, law: DictConfig, numbers: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes with covariances of their own, eigenvalues log-uniform over `condition`, and a common offset."""
    labels = numbers.integers(0, law.classes, law.examples)
    x = np.empty((law.examples, dim))
    for label in range(law.classes):
        basis, _ = np.linalg.qr(numbers.standard_normal((dim, dim)))
        deviations = np.sqrt(law.condition ** numbers.uniform(-1, 0, dim))
        rows = labels == label
        mean = law.spread * deviations.mean() * numbers.standard_normal(dim)
        x[rows] = mean + numbers.standard_normal((rows.sum(), dim)) * deviations @ basis.T
    return x / x.std() + law.offset, labels
