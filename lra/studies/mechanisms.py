"""Owns what the studies of the slot share: mechanisms out of conf/attention, inputs made for them, error, time.

Legend: H heads, L length, D head_dim.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from lra.efficiency import synchronize
from lra.grid import compose_cell


class Catalogue:
    """The mechanisms of conf/attention by name, with overrides as on the command line (`attention.pre.eps=0`)."""

    def __init__(self, head_shape: Callable[..., Any]) -> None:
        """`head_shape`: attention.base.HeadShape, from the study's configuration."""
        self._head_shape = head_shape

    def build(
        self, name: str, overrides: Sequence[str] = (), values: Mapping[str, Any] = MappingProxyType({}), *,
        head_dim: int, max_len: int, seed: int, num_heads: int = 1,
    ) -> nn.Module:  # fmt: skip
        """One draw of a mechanism, in evaluation mode. `seed` alone decides its random matrices.

        `values`: keys below `attention` that exist after the overrides, and what a cell of the study sets them to.
        """
        shape = self._head_shape(num_heads=num_heads, head_dim=head_dim, max_len=max_len)
        factory = _factory(name, tuple(overrides), tuple(values.items()))
        return factory(shape, torch.Generator().manual_seed(seed)).eval()


@cache
def _factory(name: str, overrides: tuple[str, ...], values: tuple[tuple[str, Any], ...]) -> Callable[..., nn.Module]:
    node = OmegaConf.create(_composed(name, overrides))
    OmegaConf.set_struct(node, True)  # a key that the mechanism does not have is an error
    for key, value in values:
        OmegaConf.update(node, key, value)
    return instantiate(node)


@cache
def _composed(name: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    node = compose_cell([f"attention={name}", *overrides]).attention
    return OmegaConf.to_container(node, resolve=True)  # type: ignore[return-value]


@dataclass(frozen=True)
class Inputs:
    """q, k, v [1, H, L, D]."""

    q: Tensor
    k: Tensor
    v: Tensor

    def to(self, device: torch.device) -> "Inputs":
        return Inputs(self.q.to(device), self.k.to(device), self.v.to(device))


def gaussian_inputs(
    length: int, head_dim: int, seed: int, *, num_heads: int = 1, common: float = 0.0, decay: float = 0.0,
    tied_values: bool = False,
) -> Inputs:  # fmt: skip
    """Queries and keys of mean squared entry 1, values N(0, 1).

    `common`: share of the energy of q and k that lies in one direction which all of them have in common. `decay` a:
    channel i of q and k has variance proportional to i^-a. `tied_values`: v is a linear image of k.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, 1, num_heads, length, head_dim, generator=generator)
    variances = torch.arange(1, head_dim + 1, dtype=torch.float32) ** -decay
    scale = (variances / variances.mean()).sqrt()
    direction = torch.randn(head_dim, generator=generator)
    shift = (common * head_dim) ** 0.5 * direction / direction.norm()
    q, k = ((1 - common) ** 0.5 * scale * x + shift for x in (q, k))
    mixing = torch.randn(head_dim, head_dim, generator=generator) / head_dim**0.5
    return Inputs(q, k, k @ mixing if tied_values else v)


def signal_error(out: Tensor, exact: Tensor, v: Tensor) -> float:
    """|out - exact| / |exact - mean of the values|: 1 is what plain mean pooling scores."""
    return float((out - exact).norm() / (exact - v.mean(dim=-2, keepdim=True)).norm())


def interleaved_seconds(
    work: dict[Any, Callable[[], object]], rounds: int, device: torch.device
) -> dict[Any, np.ndarray]:
    """Seconds [rounds] of every piece of work, one after the other in each round: what disturbs one disturbs all.
    A first round warms up and is not counted."""
    seconds: dict[Any, list[float]] = {key: [] for key in work}
    for turn in range(rounds + 1):
        for key, piece in work.items():
            synchronize(device)
            start = time.perf_counter()
            piece()
            synchronize(device)
            if turn:
                seconds[key].append(time.perf_counter() - start)
    return {key: np.array(values) for key, values in seconds.items()}


def bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], seed: int, resamples: int = 1000
) -> tuple[float, float, float]:
    """The statistic of `values` [draws, ...] and the ends of its 95 % interval: percentiles over resampled draws."""
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(values), (resamples, len(values)))
    resampled = np.array([statistic(values[pick]) for pick in picks])
    low, high = np.quantile(resampled, [0.025, 0.975])
    return statistic(values), float(low), float(high)
