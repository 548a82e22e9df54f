"""Owns what may be concluded from records: spread over seeds, paired tests on the same examples, ranks over tasks."""

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lra.records import RunRecord

BOOTSTRAP_DRAWS = 2_000
_MANY_COLUMNS = 20  # with fewer examples than this per distinct column, drawing them one by one is the faster way


@dataclass(frozen=True)
class Summary:
    """Of n seeds. `std` (n - 1 in the denominator) and the 95 % t-interval are None for n = 1: there is no spread."""

    n: int
    mean: float
    std: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Paired:
    """a minus b on the same seeds and the same test examples.

    `difference` is that of the mean accuracies; `low` and `high` bound it at 95 %, by 1.96 standard errors of a
    bootstrap that draws seeds and examples anew. `p_value` is McNemar's exact test for one seed; for several it is
    two-sided from the same standard error, which is too small by a factor of about sqrt((n - 1) / n) in its seed part:
    with two or three seeds read it as optimistic. `only_a` counts the (seed, example) pairs that a alone got right."""

    seeds: tuple[int, ...]
    examples: int
    difference: float
    low: float
    high: float
    p_value: float
    only_a: int
    only_b: int

    @property
    def method(self) -> str:
        return "McNemar, exact" if len(self.seeds) == 1 else "bootstrap over seeds and examples"


@dataclass(frozen=True)
class Ranks:
    """Mean ranks (1 is best) of attentions over the tasks that all of them finished, and what may be concluded."""

    tasks: tuple[str, ...]
    mean: Mapping[str, float]  # best first
    friedman_p: float
    critical_difference: float
    left_out: tuple[str, ...]  # attentions with a missing task


def summarise(values: Sequence[float], confidence: float = 0.95) -> Summary:
    n = len(values)
    if not n:
        raise ValueError("no value to summarise")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, None, None, None)
    std = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / math.sqrt(n)
    return Summary(n, mean, std, mean - half, mean + half)


def right_answers(record: RunRecord) -> NDArray[np.bool_]:
    """Which test examples the best-validation model got right; ValueError when the bits contradict the counts."""
    best = record.result["test_best"]
    bits = np.unpackbits(np.frombuffer(base64.b64decode(best["right"]), dtype=np.uint8))
    right = bits[: best["total"]].astype(bool)
    if len(bits) - best["total"] not in range(8) or right.sum() != best["correct"]:
        raise ValueError(
            f"record {record.run_id}: its per-example bits do not match {best['correct']} of {best['total']} right; "
            "run this cell again with rerun=true"
        )
    return right


def mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Exact two-sided p: among the examples that one alone got right, each is as likely to win under the hypothesis."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def paired(a: Mapping[int, RunRecord], b: Mapping[int, RunRecord], draws: int = BOOTSTRAP_DRAWS) -> Paired:
    """Compare {seed: record} with {seed: record} on the seeds that both have. ValueError: nothing to pair, and why."""
    seeds = tuple(sorted(set(a) & set(b)))
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}")
    digests = {runs[seed].data.get("sha256", {}).get("test") for runs in (a, b) for seed in seeds}
    if len(digests) > 1 or None in digests:
        raise ValueError("the test examples differ (another SHA-256 of the test split), so nothing can be paired")
    right_a = np.stack([right_answers(a[seed]) for seed in seeds])  # [S, N]
    right_b = np.stack([right_answers(b[seed]) for seed in seeds])
    low, high, p_value = _bootstrap(right_a.astype(np.int8) - right_b.astype(np.int8), draws)
    return Paired(
        seeds=seeds,
        examples=right_a.shape[1],
        difference=float(right_a.mean() - right_b.mean()),
        low=low,
        high=high,
        p_value=mcnemar(right_a[0], right_b[0]) if len(seeds) == 1 else p_value,
        only_a=int((right_a & ~right_b).sum()),
        only_b=int((right_b & ~right_a).sum()),
    )


def _bootstrap(difference: NDArray[np.int8], draws: int) -> tuple[float, float, float]:
    """95 % bounds and two-sided p of the mean of `difference` [S, N], seeds and examples drawn anew independently.

    Examples with the same column are interchangeable, so a draw of N examples is one multinomial over the distinct
    columns, which are few for a few seeds. The generator is fixed: the same records give the same interval."""
    num_seeds, num_examples = difference.shape
    mean = float(difference.mean())
    difference = difference.astype(np.float32)  # sums of small whole numbers stay exact, and products are fast
    columns, counts = np.unique(difference, axis=1, return_counts=True)  # [S, K], [K]
    generator = np.random.Generator(np.random.PCG64(0))
    seeds = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=draws).astype(np.float32)  # [B, S]
    if len(counts) * _MANY_COLUMNS <= num_examples:
        examples = generator.multinomial(num_examples, counts / num_examples, size=draws)  # [B, K]
        totals = np.einsum("bk,bk->b", _products(seeds, columns), examples)
    else:
        totals = np.concatenate([_drawn_one_by_one(part, difference, generator) for part in np.array_split(seeds, 20)])
    error = float((totals / (num_seeds * num_examples)).std(ddof=1))
    if error == 0:
        return mean, mean, 1.0 if mean == 0 else 1 / draws
    return mean - 1.96 * error, mean + 1.96 * error, float(2 * stats.norm.sf(abs(mean) / error))


def _products(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """a @ b without BLAS, whose threads cost more than these small products."""
    return np.einsum("ij,jk->ik", a, b)


def _drawn_one_by_one(
    seeds: NDArray[np.float32], difference: NDArray[np.float32], generator: np.random.Generator
) -> NDArray[np.float32]:
    chosen = generator.integers(difference.shape[1], size=(len(seeds), difference.shape[1]), dtype=np.int32)
    return np.take_along_axis(_products(seeds, difference), chosen, axis=1).sum(axis=1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the given order: the family-wise error rate holds under any dependence."""
    adjusted, running = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = running
    return adjusted


def mean_ranks(accuracies: Mapping[str, Mapping[str, float]], alpha: float = 0.05) -> Ranks:
    """{attention: {task: accuracy}} -> ranks over the tasks, Friedman's test, Nemenyi's critical difference.

    Two mean ranks differ when they lie further apart than the critical difference. Conditions: the tasks are the
    blocks and count as independent; ties share their mean rank; needs three attentions and two tasks; with five tasks
    the approximation is coarse, and a small critical difference cannot come out. ValueError when there is too little."""
    tasks = tuple(dict.fromkeys(task for row in accuracies.values() for task in row))
    complete = {name: row for name, row in accuracies.items() if set(row) == set(tasks)}
    if len(complete) < 3 or len(tasks) < 2:
        raise ValueError(
            f"ranks need three attentions that finished the same two tasks or more; "
            f"{len(complete)} finished all of {', '.join(tasks) or 'no task'}"
        )
    values = np.array([[-row[task] for task in tasks] for row in complete.values()])  # [K, N]
    ranks = stats.rankdata(values, axis=0).mean(axis=1)
    if np.ptp(values, axis=0).any():
        p_value = float(stats.friedmanchisquare(*values).pvalue)
    else:
        p_value = 1.0
    k, n = values.shape
    quantile = float(stats.studentized_range.ppf(1 - alpha, k, 1_000_000)) / math.sqrt(2)
    ordered = sorted(zip(complete, ranks.tolist(), strict=True), key=lambda item: (item[1], item[0]))
    left_out = tuple(name for name in accuracies if name not in complete)
    return Ranks(tasks, dict(ordered), p_value, quantile * math.sqrt(k * (k + 1) / (6 * n)), left_out)
