"""Local, Longformer, Sparse Transformer and BigBird against dense softmax under their boolean patterns."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attention.base import Attention, HeadShape
from attention.softmax import softmax_attention
from attention.sparse.bigbird import BigBird
from attention.sparse.local import Local
from attention.sparse.longformer import Longformer
from attention.sparse.sparse_transformer import Fixed, Strided
from tests.attention.conftest import dense_attention, deviation, draw, draw_qkv, padding

SHAPE = HeadShape(num_heads=2, head_dim=8, max_len=64)
LENGTHS = (1, 7, 24, 37, 53)
Pattern = Callable[[int, Tensor], Tensor]  # length, mask [B, L] -> allowed, broadcastable to [B, H, L, L]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _pair(length: int) -> tuple[Tensor, Tensor]:
    position = torch.arange(length)
    return position[:, None], position


def _local(overlap: int) -> Pattern:
    def pattern(length: int, mask: Tensor) -> Tensor:
        i, j = _pair(length)
        return (i // 8 - j // 8).abs() <= overlap

    return pattern


def _longformer(num_global: int) -> Pattern:
    def pattern(length: int, mask: Tensor) -> Tensor:
        i, j = _pair(length)
        return ((i - j).abs() <= 5) | (i < num_global) | (j < num_global)

    return pattern


def _heads(near: Tensor, far: Tensor, split: bool) -> Tensor:
    return torch.stack([near, far]) if split else near | far


def _strided(split: bool) -> Pattern:
    def pattern(length: int, mask: Tensor) -> Tensor:
        i, j = _pair(length)
        return _heads((i - j).abs() < 7, (i - j) % 7 == 0, split)

    return pattern


def _fixed(split: bool) -> Pattern:
    def pattern(length: int, mask: Tensor) -> Tensor:
        i, j = _pair(length)
        return _heads(i // 7 == j // 7, (j % 7 >= 5).expand(length, -1), split)

    return pattern


def _bigbird(length: int, mask: Tensor) -> Tensor:
    """Written out token by token from the definition, with the random blocks taken off the ranking one by one."""
    ranking = BIGBIRD.ranking
    allowed = torch.zeros(len(mask), 2, length, length, dtype=torch.bool)
    for b in range(len(mask)):
        last = int((~mask[b]).nonzero().max()) // 4
        for h in range(2):
            for i in range(length):
                a = i // 4
                seen = {a - 1, a, a + 1, 0, last}
                free = [c for c in range(last + 1) if c not in seen]
                seen |= set(sorted(free, key=lambda c: -ranking[h, a, c])[:2])
                for j in range(length):
                    allowed[b, h, i, j] = a in (0, last) or j // 4 in seen
    return allowed


BIGBIRD = BigBird(SHAPE, _generator(), block_size=4, num_random=2)
CASES: dict[str, tuple[Attention, Pattern]] = {
    "local": (Local(SHAPE, _generator(), block_size=8, overlap=0), _local(0)),
    "local-overlap": (Local(SHAPE, _generator(), block_size=8, overlap=1), _local(1)),
    "longformer": (Longformer(SHAPE, _generator(), window=10, num_global=0), _longformer(0)),
    "longformer-global": (Longformer(SHAPE, _generator(), window=10, num_global=3), _longformer(3)),
    "strided": (Strided(SHAPE, _generator(), stride=7, heads="merged"), _strided(False)),
    "strided-split": (Strided(SHAPE, _generator(), stride=7, heads="split"), _strided(True)),
    "fixed": (Fixed(SHAPE, _generator(), stride=7, num_summary=2, heads="merged"), _fixed(False)),
    "fixed-split": (Fixed(SHAPE, _generator(), stride=7, num_summary=2, heads="split"), _fixed(True)),
    "bigbird": (BIGBIRD, _bigbird),
}
every_case = pytest.mark.parametrize(("module", "pattern"), CASES.values(), ids=CASES)


def _masks(length: int) -> list[Tensor]:
    """None, padding at the end and in the middle, and a whole run of blocks without a real token."""
    none = torch.zeros(2, length, dtype=torch.bool)
    if length < 5:
        return [none]
    gap = none.clone()
    gap[0, length // 2 :] = True
    gap[1, 1 : length - 2] = True
    return [none, padding(length), gap]


@every_case
@pytest.mark.parametrize("length", LENGTHS)
def test_outputs_and_gradients_equal_dense_softmax_under_the_pattern(
    module: Attention, pattern: Pattern, length: int
) -> None:
    for mask in _masks(length):
        inputs = [x.requires_grad_() for x in draw_qkv(length, head_dim=8, scale=1.0)]
        q, k, v = inputs
        logits = q @ k.transpose(-2, -1) / math.sqrt(8)
        expected = dense_attention(logits, v, pattern(length, mask) & ~mask[:, None, None])
        out = module(*inputs, mask)
        assert deviation(out, expected) < 1e-12  # also 0 where no key is allowed
        cotangent = draw(*out.shape, seed=7)
        found, truth = (torch.autograd.grad((o * cotangent).sum(), inputs) for o in (out, expected))
        assert all(deviation(a, b) < 1e-11 or b.abs().max() < 1e-12 for a, b in zip(found, truth, strict=True))


@every_case
def test_a_value_is_reached_exactly_when_it_is_a_neighbour(module: Attention, pattern: Pattern) -> None:
    length = 53
    mask = padding(length)
    q, k, _ = draw_qkv(length, head_dim=8)
    unit = torch.eye(length, dtype=q.dtype).expand(2, 2, -1, -1).clone().requires_grad_()
    weights = module(q, k, unit, mask)  # with the unit matrix for v, outputs are the weights [B, H, L, L]
    allowed = (pattern(length, mask) & ~mask[:, None, None]).expand(weights.shape)
    assert torch.equal(weights != 0, allowed)
    (gradient,) = torch.autograd.grad(weights[1, 0, 11].sum(), unit)
    assert torch.equal(gradient[1, 0].abs().sum(dim=-1) != 0, allowed[1, 0, 11])


@pytest.mark.parametrize(
    "module",
    [
        Local(SHAPE, _generator(), block_size=64, overlap=0),
        Longformer(SHAPE, _generator(), window=128, num_global=0),
        Longformer(SHAPE, _generator(), window=2, num_global=64),
        Strided(SHAPE, _generator(), stride=64, heads="merged"),
        Fixed(SHAPE, _generator(), stride=64, num_summary=1, heads="merged"),
        Fixed(SHAPE, _generator(), stride=5, num_summary=5, heads="merged"),
        BigBird(SHAPE, _generator(), block_size=8, num_random=3),
    ],
    ids=lambda m: f"{type(m).__name__}",
)
def test_a_pattern_that_covers_everything_is_softmax(module: Attention) -> None:
    for length in (1, 30, 53):  # 7 blocks of 8: BigBird's second block has 3 + 1 + 3 of them
        q, k, v = draw_qkv(length, head_dim=8)
        mask = padding(length)
        out, expected = module(q, k, v, mask), softmax_attention(q, k, v, mask)
        assert deviation(out.transpose(1, 2)[~mask], expected.transpose(1, 2)[~mask]) < 1e-12


def test_bigbird_attends_to_as_many_different_blocks_as_it_says() -> None:
    shape = HeadShape(num_heads=3, head_dim=8, max_len=400)
    module = BigBird(shape, _generator(), block_size=10, num_random=3)
    pattern = module.pattern(torch.tensor([39, 20]), 40)  # [B, H, N, N]
    counts = pattern[0].sum(dim=-1)
    assert (counts[:, 2:38] == 8).all()  # 3 window, 2 global, 3 random: none counted twice
    assert (counts[:, [1, 38]] == 7).all()  # their window holds a global block
    assert not pattern[1, :, :19, 22:].any()  # nothing random beyond the last real block
    again = BigBird(shape, _generator(), block_size=10, num_random=3)
    assert torch.equal(module.ranking, again.ranking)
    assert not torch.equal(pattern[0, 0], pattern[0, 1])  # each head has its own draw


def test_bigbird_draws_every_free_block_equally_often() -> None:
    """2000 heads, 3 of 15 free blocks for query block 10 of 20: counts are Binomial(2000, 1/5), and 6 standard
    deviations of it leave a false-alarm probability below 1e-7."""
    module = BigBird(HeadShape(2000, 8, 20), _generator(), block_size=1, num_random=3)
    drawn = module.pattern(torch.tensor([19]), 20)[0, :, 10].sum(dim=0).double()
    free = [c for c in range(20) if c not in (0, 9, 10, 11, 19)]
    assert ((drawn[free] - 400).abs() < 6 * math.sqrt(2000 * 0.2 * 0.8)).all()


@pytest.mark.parametrize(
    "build",
    [
        lambda: Local(SHAPE, _generator(), block_size=0, overlap=0),
        lambda: Longformer(SHAPE, _generator(), window=7, num_global=0),
        lambda: Strided(SHAPE, _generator(), stride=7, heads="both"),
        lambda: Strided(HeadShape(1, 8, 64), _generator(), stride=7, heads="split"),
        lambda: Fixed(SHAPE, _generator(), stride=7, num_summary=8, heads="merged"),
        lambda: BigBird(SHAPE, _generator(), block_size=4, num_random=-1),
        lambda: BIGBIRD(*draw_qkv(65, head_dim=8)),
    ],
)
def test_impossible_settings_are_refused(build: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"needs|unknown|raise max_len"):
        build()
