"""Owns the ListOps generator: a pool of distinct random expressions that is the same on every machine for a seed.

The distribution is that of the Long Range Arena (arXiv:2011.04006): grow a random tree, keep it when its length is
strictly between two bounds, never keep the same expression twice. The draws are cut into blocks. Block b has a
xoshiro256++ stream of its own (Blackman & Vigna, arXiv:1805.01407), seeded by SHA-256 of (seed, b), and integer
arithmetic only, so neither the number of workers nor the machine can change a byte.
"""

import hashlib
import logging
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial

import numpy as np
from numba import njit

from data.base import DataError
from data.listops_pool import MIN_ARGS, Grammar, Pool, offsets_of
from data.listops_text import CLOSE, FIRST_DIGIT, MED, MIN, SM

_MOST_DRAWS_PER_EXAMPLE = 500  # the published range needs 12
_DRAWS_FOR_FREE = 2_000_000  # a few seconds; only after them is a length range given up
_SECONDS_BETWEEN_REPORTS = 5.0

_logger = logging.getLogger(__name__)


def generate(grammar: Grammar, num_examples: int, seed: int, num_workers: int) -> Pool:
    """The first `num_examples` distinct expressions of the stream. Raises DataError when too few fit the lengths."""
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    seen: set[bytes] = set()
    draws = accepted = duplicates = 0
    next_report = time.monotonic() + _SECONDS_BETWEEN_REPORTS
    with closing(_blocks(grammar, seed, num_workers)) as blocks:
        for tokens, lengths, labels in blocks:
            draws += grammar.draws_per_block
            accepted += len(lengths)
            keep = _distinct(tokens, lengths, seen)
            duplicates += len(keep) - int(keep.sum())
            kept.append((tokens[np.repeat(keep, lengths)], lengths[keep], labels[keep]))
            if len(seen) >= num_examples:
                break
            if draws > max(_DRAWS_FOR_FREE, _MOST_DRAWS_PER_EXAMPLE * len(seen)):
                raise DataError(_infeasible(grammar, num_examples, draws, accepted, len(seen)))
            if time.monotonic() > next_report:
                _logger.info("listops: %d of %d expressions generated", len(seen), num_examples)
                next_report += _SECONDS_BETWEEN_REPORTS
    tokens, lengths, labels = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    offsets = offsets_of(lengths[:num_examples])
    return Pool(tokens[: offsets[-1]], offsets, labels[:num_examples], draws, accepted, duplicates)


def _blocks(grammar: Grammar, seed: int, num_workers: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The endless blocks in order, computed a few ahead. Threads suffice: the compiled code holds no lock."""
    draw = partial(_draw, grammar, seed)
    with ThreadPoolExecutor(num_workers) as executor:
        pending: deque[Future] = deque(executor.submit(draw, block) for block in range(2 * num_workers))
        submitted = len(pending)
        try:
            while True:
                block = pending.popleft().result()
                pending.append(executor.submit(draw, submitted))
                submitted += 1
                yield block
        finally:
            executor.shutdown(cancel_futures=True)


def _draw(grammar: Grammar, seed: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    state = np.frombuffer(hashlib.sha256(f"listops {seed} {block}".encode()).digest(), dtype="<u8").astype(np.uint64)
    # A draw of 32 bits below the threshold makes an operator: probability exact to 2^-32, and exactly 1/4.
    threshold = np.uint64(int(grammar.operator_probability * 2**32))
    draws = grammar.draws_per_block
    tokens = np.empty(draws * grammar.room, dtype=np.uint8)  # reserved, not touched: most pages never become memory
    lengths, labels = np.empty(draws, dtype=np.int64), np.empty(draws, dtype=np.uint8)
    arguments = np.empty((grammar.max_depth, grammar.max_args), dtype=np.int64)
    used, count = _draw_block(
        state, threshold, grammar.min_length, grammar.max_length, grammar.room, arguments, tokens, lengths, labels
    )
    return tokens[:used].copy(), lengths[:count], labels[:count]


def _distinct(tokens: np.ndarray, lengths: np.ndarray, seen: set[bytes]) -> np.ndarray:
    """[N] bool: which expressions are met for the first time. `seen` grows by them."""
    offsets = offsets_of(lengths)
    keep = np.zeros(len(lengths), dtype=bool)
    for index in range(len(lengths)):
        # 128 bits stand for an expression: two distinct ones meet with probability below 1e-28 in a published pool
        digest = hashlib.blake2b(tokens[offsets[index] : offsets[index + 1]], digest_size=16).digest()
        keep[index] = digest not in seen
        seen.add(digest)
    return keep


def _infeasible(grammar: Grammar, num_examples: int, draws: int, accepted: int, distinct: int) -> str:
    return (
        f"listops: {draws} random expressions gave {accepted} with a length strictly between task.min_length="
        f"{grammar.min_length} and task.max_length={grammar.max_length}, {distinct} of them distinct, where "
        f"{num_examples} are wanted. Widen task.min_length/task.max_length, ask for fewer examples (task.num_train, "
        f"task.num_val, task.num_test), or change task.max_depth, task.max_args, task.operator_probability"
    )


@njit(nogil=True)
def _draw_block(state, threshold, min_length, max_length, room, arguments, tokens, lengths, labels):
    """Draw len(lengths) trees; write tokens, length and value of those that fit -> (tokens, trees) written."""
    max_depth = len(arguments)
    operators = np.empty(max_depth, dtype=np.int64)
    wanted = np.empty(max_depth, dtype=np.int64)
    filled = np.empty(max_depth, dtype=np.int64)
    used = count = 0
    for _ in range(len(lengths)):
        tree = tokens[used : used + room]
        length, value = _grow(state, threshold, max_length, tree, operators, wanted, filled, arguments)
        if min_length < length and length < max_length:
            lengths[count] = length
            labels[count] = value
            used += length
            count += 1
    return used, count


@njit(nogil=True)
def _grow(state, threshold, max_length, tokens, operators, wanted, filled, arguments):
    """Write one random tree in prefix order into `tokens` -> (length, value), or (-1, 0) once it is too long."""
    max_depth, max_args = arguments.shape
    length = depth = 0  # depth: operators that are open
    while length < max_length:
        word = _next(state)
        low = word & np.uint64(0xFFFFFFFF)
        if depth + 1 < max_depth and (word >> np.uint64(32)) < threshold:
            operators[depth] = MIN + _below(_next(state) & np.uint64(0xFFFFFFFF), 4)
            wanted[depth] = MIN_ARGS + _below(low, max_args - MIN_ARGS + 1)
            filled[depth] = 0
            tokens[length] = operators[depth]
            length += 1
            depth += 1
            continue
        value = _below(low, 10)
        tokens[length] = FIRST_DIGIT + value
        length += 1
        while depth > 0:  # the value is an argument, which may complete its operator, which is an argument, ...
            arguments[depth - 1, filled[depth - 1]] = value
            filled[depth - 1] += 1
            if filled[depth - 1] < wanted[depth - 1]:
                break
            depth -= 1
            value = _apply(operators[depth], arguments[depth], wanted[depth])
            tokens[length] = CLOSE
            length += 1
        if depth == 0:
            return length, value
    return -1, 0


@njit(nogil=True)
def _apply(operator, arguments, count):
    """The value of an operator on arguments[:count], which it may reorder."""
    if operator != MED and operator != SM:
        best = arguments[0]
        for index in range(1, count):
            best = min(best, arguments[index]) if operator == MIN else max(best, arguments[index])
        return best
    if operator == MED:
        for index in range(1, count):  # insertion sort: at most ten digits
            place, value = index, arguments[index]
            while place > 0 and arguments[place - 1] > value:
                arguments[place] = arguments[place - 1]
                place -= 1
            arguments[place] = value
        return (arguments[(count - 1) // 2] + arguments[count // 2]) // 2
    total = 0
    for index in range(count):
        total += arguments[index]
    return total % 10


@njit(nogil=True)
def _below(bits, bound):
    """A number in 0..bound-1 from 32 random bits; every probability is within 2^-32 of 1/bound."""
    return np.int64((bits * np.uint64(bound)) >> np.uint64(32))


@njit(nogil=True)
def _next(state):
    """The next 64 bits of a xoshiro256++ stream."""
    first, second, third, fourth = state[0], state[1], state[2], state[3]
    result = _rotate(first + fourth, 23) + first
    state[2] = third ^ first
    state[3] = fourth ^ second
    state[1] = second ^ state[2]
    state[0] = first ^ state[3]
    state[2] ^= second << np.uint64(17)
    state[3] = _rotate(state[3], 45)
    return result


@njit(nogil=True)
def _rotate(word, bits):
    return (word << np.uint64(bits)) | (word >> np.uint64(64 - bits))
