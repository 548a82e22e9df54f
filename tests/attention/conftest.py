"""Owns what the attention tests share: building a mechanism from its YAML, drawing inputs, and the contract's cases."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hydra
import pytest
import torch
from torch import Tensor

from attention.base import Attention, AttentionFactory, HeadShape

CONF = Path(__file__).parents[2] / "conf" / "attention"
# the rules of the slot that a mechanism may be exempt from, when its own definition contradicts them
RULES = (*(f"U{i}" for i in range(1, 14)), "parameter_gradients", "memory")
# rules whose exemption is itself tested: if the rule holds after all, the exemption must go
CHECKED_EXEMPTIONS = ("U3", "U5", "U6", "U7")


@cache
def factory_of(name: str) -> AttentionFactory:
    with hydra.initialize_config_dir(str(CONF.parent), version_base="1.3"):
        return hydra.utils.instantiate(hydra.compose(f"attention/{name}").attention)


def build(
    name: str, *, max_len: int = 64, num_heads: int = 2, head_dim: int = 16, seed: int = 0, dtype=torch.float64
) -> Attention:
    """The mechanism of conf/attention/<name>.yaml, built as SequenceClassifier builds it, in eval mode."""
    factory = factory_of(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for nn.Linear and the like inside a mechanism
        module = factory(HeadShape(num_heads, head_dim, max_len), torch.Generator().manual_seed(seed))
    return module.to(dtype).eval()


build_once = cache(build)  # for tests that leave the module as it is


def draw(*shape: int, seed: int, scale: float = 0.5, dtype=torch.float64) -> Tensor:
    """Gaussian, standard deviation `scale`, from its own generator."""
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def draw_qkv(
    length: int,
    *,
    batch: int = 2,
    num_heads: int = 2,
    head_dim: int = 16,
    seed: int = 1,
    scale: float = 0.5,
    dtype=torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, H, L, D]."""
    shape = (batch, num_heads, length, head_dim)
    q, k, v = (draw(*shape, seed=10 * seed + i, scale=scale, dtype=dtype) for i in range(3))
    return q, k, v


def padding(length: int) -> Tensor:
    """[2, L]: the first example ends in padding, the second has it in the middle."""
    mask = torch.zeros(2, length, dtype=torch.bool)
    mask[0, length - length // 5 :] = True
    mask[1, length // 3 : length // 2] = True
    return mask


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest expected entry; inf for NaN."""
    error = (actual - expected).abs().max() / expected.abs().max().clamp_min(1e-12)
    return float(error.detach().nan_to_num(torch.inf, torch.inf))


def dense_attention(logits: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """The oracle: softmax over the keys j with allowed[..., i, j], 0 without any; logits [B, H, L, L], v [B, H, L, D]."""
    weights = torch.where(allowed, logits.exp(), 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    return (weights / torch.where(total > 0, total, 1.0)) @ v


@dataclass(frozen=True)
class Subject:
    """One mechanism under one rule; `reason` is its exemption, None when the rule binds it."""

    name: str
    rule: str
    reason: str | None

    def judge(self, errors: dict[str, float], tolerance: float) -> None:
        """`errors`: case -> deviation from the rule. An exemption must be needed in at least one case."""
        if self.reason is None:
            bad = {case: error for case, error in errors.items() if not error <= tolerance}
            assert not bad, f"{self.name} breaks {self.rule} by {bad} (tolerance {tolerance})"
        else:
            assert max(errors.values()) > tolerance, f"{self.name} satisfies {self.rule}: drop its exemption"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "rule(name): run over every file of conf/attention/, with its exemptions")


@cache
def mechanisms() -> dict[str, tuple[dict[str, str], str]]:
    """name -> (exemptions, complexity); a mechanism that cannot be built has neither, so that its tests show why."""
    found = {}
    for name in sorted(path.stem for path in CONF.glob("*.yaml")):
        try:
            module = build_once(name)
        except Exception:
            found[name] = ({}, "")
        else:
            found[name] = (dict(module.exemptions), module.description.complexity)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("rule")
    if marker is None:
        return
    (rule,) = marker.args
    cases = []
    for name, (exemptions, complexity) in mechanisms().items():
        if rule == "memory" and "L^2" in complexity:
            continue  # such a mechanism claims no more than quadratic memory
        reason = exemptions.get(rule)
        suffix = "" if reason is None else "-exempt"
        cases.append(pytest.param(Subject(name, rule, reason), id=f"{name}-{rule}{suffix}"))
    metafunc.parametrize("subject", cases, indirect=True)


@pytest.fixture
def subject(request: pytest.FixtureRequest) -> Subject:
    """The mechanism under test; an exempt one is skipped with its reason, or handed on to show that it needs it."""
    case = request.param
    if case.reason is not None and case.rule not in CHECKED_EXEMPTIONS:
        pytest.skip(f"{case.name} is exempt from {case.rule}: {case.reason}")
    return case
