"""Rule U13 of the slot's contract: over fresh draws, a feature map has the mean and the second moment that it declares.

Seeds are fixed, so a pass is final. Each bound is 6 standard errors of a mean over 60 independent draws: were the
seeds drawn anew, a sound map would fail it with a probability below 1e-6.
"""

import pytest
import torch
from torch import Tensor

from attention.feature_maps.base import FeatureMap
from attention.feature_maps.maclaurin import Maclaurin
from tests.attention.conftest import Subject, build, draw

DRAWS, POINTS, DIM = 60, 4, 16
BOUND = 6.0


def feature_map_of(name: str, seed: int) -> FeatureMap | None:
    module = build(name, num_heads=1, head_dim=DIM, seed=seed)
    return next((part for part in module.modules() if isinstance(part, FeatureMap)), None)


def products(feature_map: FeatureMap, q: Tensor, k: Tensor) -> Tensor:
    """phi_m(q_p) phi_m(k_p) of each feature m and pair p: [P, F]."""
    # Centring Maclaurin features changes whole rows of weights, which only a ratio ignores: `kernel` means the plain form
    prepared = None if isinstance(feature_map, Maclaurin) else feature_map.prepare(q, k, None)
    total = torch.ones((), dtype=q.dtype)
    for features in (feature_map(q, True, prepared), feature_map(k, False, prepared)):
        total = total if features.values is None else total * features.values
        total = total if features.logits is None else total * features.logits.exp()
    return total.expand(1, 1, POINTS, feature_map.num_outputs)[0, 0]


def check(samples: Tensor, expected: Tensor, claim: str) -> None:
    """samples [R, P] against their declared mean [P]."""
    error = samples.std(dim=0) / len(samples) ** 0.5
    worst = ((samples.mean(dim=0) - expected).abs() / (BOUND * error + 1e-9 * expected.abs())).max()
    found = f"mean {samples.mean(dim=0).tolist()}, declared {expected.tolist()}, standard error {error.tolist()}"
    assert worst <= 1, f"{claim}: {found}"


@pytest.mark.rule("U13")
def test_feature_maps_have_the_moments_they_declare(subject: Subject) -> None:
    first = feature_map_of(subject.name, 0)
    q, k = draw(1, 1, POINTS, DIM, seed=1, scale=0.2), draw(1, 1, POINTS, DIM, seed=2, scale=0.2)
    if first is None:
        return
    x, y = (first.scaled(z)[0, 0].detach() for z in (q, k))
    try:
        kernel = first.kernel(x, y)
    except NotImplementedError:
        assert not first.random or list(first.parameters()), (
            "a random map that learns nothing needs a closed-form kernel"
        )
        return
    draws = [feature_map_of(subject.name, seed) for seed in range(DRAWS if first.random else 1)]
    estimates = torch.stack([products(m, q, k) for m in draws]).detach()  # [R, P, F]
    if not first.random:
        torch.testing.assert_close(estimates[0].sum(dim=-1), kernel)
        return
    check(estimates.sum(dim=-1), kernel, "kernel")
    if hasattr(first, "variance"):
        deviations = (estimates.sum(dim=-1) - kernel).square()
        check(deviations, first.variance(x, y), "variance")
    elif type(first).second_moment is not FeatureMap.second_moment:
        # several outputs (cos and sin, w and -w) may belong to one random row; they lie in blocks of one output per row
        rows = getattr(getattr(first, "projection", first), "num_rows", first.num_outputs)
        single = rows * estimates.unflatten(-1, (-1, rows)).sum(dim=-2)
        check(single.square().mean(dim=-1), first.second_moment(x, y), "second moment")
