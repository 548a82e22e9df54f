"""Owns the compiled core of the Pathfinder generator: where two long snakes and their distractors go.

It follows the two-snake generator of drewlinsley/pathfinder at commit ab9c130 (snakes2.py, snakes.py; Linsley et al.
2018, arXiv:1805.08315). Places are integers (row, column), directions index the tables, occupancy is 0..255. Every image
has a random stream of its own, a function of (seed, index), so that no number of workers changes a byte.
"""

import numpy as np
from numba import njit

from data.pathfinder_tables import NUM_HEADINGS

_OCCUPIED = 77  # above 0.3 of 255: no first paddle here
_CROSSING = 459  # 1.8 of 255: two paddles on one pixel
_UNIFORM_TRIES = 32


@njit(nogil=True)
def _mix(z):
    """SplitMix64's output function (Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(nogil=True)
def _uniform(state):
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.float64(_mix(state[0]) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@njit(nogil=True)
def below(state, n):
    return int(_uniform(state) * n)


@njit(nogil=True)
def _inside(y, x, resolution):
    return 0 <= y < resolution and 0 <= x < resolution


@njit(nogil=True)
def _moved(place, displacement):
    """All moves are rounded up, on both axes (snakes.py:419-426). The sum is what is rounded: so a snake that runs
    straight up or left is a pixel off near the origin, where 1e-16 is not yet lost, as in the published images."""
    return int(np.ceil(place + displacement))


@njit(nogil=True)
def _commit(mask, sprite, y, x):
    """mask = max(mask, sprite centred on (y, x)), cut off at the edges."""
    reach = len(sprite) // 2
    for row in range(max(y - reach, 0), min(y + reach + 1, len(mask))):
        for column in range(max(x - reach, 0), min(x + reach + 1, len(mask))):
            value = sprite[row - y + reach, column - x + reach]
            if value > mask[row, column]:
                mask[row, column] = value


@njit(nogil=True)
def _crosses(mask, sprite, y, x):
    reach = len(sprite) // 2
    for row in range(max(y - reach, 0), min(y + reach + 1, len(mask))):
        for column in range(max(x - reach, 0), min(x + reach + 1, len(mask))):
            if int(mask[row, column]) + int(sprite[row - y + reach, column - x + reach]) >= _CROSSING:
                return True
    return False


@njit(nogil=True)
def _is_free(footprint, mask, frame, y, x):
    """Whether a first paddle may have its tail at (y, x): its footprint [F, 2] clear of the mask and of a frame."""
    size = len(mask)
    for i in range(len(footprint)):
        row, column = y + footprint[i, 0], x + footprint[i, 1]
        if _inside(row, column, size) and (
            min(row, column) < frame or max(row, column) >= size - frame or mask[row, column] >= _OCCUPIED
        ):
            return False
    return True


@njit(nogil=True)
def _free_place(footprint, mask, frame, state):
    """Uniform over the free places, (-1, -1) when there is none: by trial, and by counting where trials fail."""
    size = len(mask)
    for _ in range(_UNIFORM_TRIES):
        y, x = below(state, size), below(state, size)
        if _is_free(footprint, mask, frame, y, x):
            return y, x
    free = np.empty(size * size, np.int64)
    count = 0
    for place in range(size * size):
        if _is_free(footprint, mask, frame, place // size, place % size):
            free[count] = place
            count += 1
    if count == 0:
        return -1, -1
    place = free[below(state, count)]
    return place // size, place % size


@njit(nogil=True)
def _is_crowded(mask):
    """Less than 1 % of the pixels is free."""
    free = 0
    for row in range(len(mask)):
        for column in range(len(mask)):
            free += mask[row, column] < _OCCUPIED
    return free < 0.01 * mask.size


@njit(nogil=True)
def _place_first(t, heading, y, x, size, paddle, pivot):
    """Put a first paddle down -> whether it ends inside the image. `paddle` becomes (y, x, direction)."""
    paddle[0], paddle[1], paddle[2] = y, x, heading
    head_y, head_x = _moved(y, t.head[heading, 0]), _moved(x, t.head[heading, 1])
    pivot[0], pivot[1] = _moved(head_y, t.pivot[heading, 0]), _moved(head_x, t.pivot[heading, 1])
    return _inside(head_y, head_x, size) and _inside(pivot[0], pivot[1], size)


@njit(nogil=True)
def _start_snake(t, mask, frame, tries, state, paddle, pivot):
    """Put a snake's first paddle on a free place -> success."""
    for _ in range(tries):
        heading = below(state, NUM_HEADINGS)
        if t.blocked[heading]:
            return False
        y, x = _free_place(t.footprint[heading, : t.footprint_size[heading]], mask, frame, state)
        if y < 0:
            return False
        if _place_first(t, heading, y, x, len(mask), paddle, pivot):
            return True
    return False


@njit(nogil=True)
def _start_second_snake(t, first, size, tries, state, paddle, pivot):
    """The second snake starts on a circle about the first one's tail, wherever that is inside the image."""
    for _ in range(tries):
        heading, angle = below(state, NUM_HEADINGS), below(state, NUM_HEADINGS)
        y, x = int(np.rint(first[0] + t.second[angle, 0])), int(np.rint(first[1] + t.second[angle, 1]))
        if _place_first(t, heading, y, x, size, paddle, pivot):
            return True
    return False


@njit(nogil=True)
def _weigh(candidates, weights, near, mask, pivot, cumulative):
    """Running sum of the candidates' weights times how free the mask is about them -> their total."""
    total = 0.0
    for j in range(len(candidates)):
        y, x = pivot[0] + candidates[j, 0], pivot[1] + candidates[j, 1]
        if weights[j] > 0 and _inside(y, x, len(mask)):
            taken = 0
            for i in range(len(near)):
                row, column = y + near[i, 0], x + near[i, 1]
                if _inside(row, column, len(mask)):
                    taken = max(taken, int(mask[row, column]))
            total += weights[j] * (255 - taken) / 255.0
        cumulative[j] = total
    return total


@njit(nogil=True)
def _extend(t, mask, pivot, tries, state, last, paddle):
    """Add a paddle after paddle `last` and commit `last` to the mask -> success. The pivot moves on, and `paddle`
    becomes (y, x, direction) of the new head."""
    way = last[2]
    pivot[0], pivot[1] = _moved(pivot[0], t.stride[way, 0]), _moved(pivot[1], t.stride[way, 1])
    cumulative = np.empty(len(t.candidates))
    total = _weigh(t.candidates, t.weights[way], t.near, mask, pivot, cumulative)
    if total < 1e-4:
        return False
    for _ in range(tries):
        drawn, j = _uniform(state) * total, 0
        while j < len(cumulative) - 1 and cumulative[j] <= drawn:
            j += 1
        y, x = pivot[0] + t.candidates[j, 0], pivot[1] + t.candidates[j, 1]
        if not _crosses(mask, t.mask[NUM_HEADINGS + j], y, x):
            paddle[0], paddle[1], paddle[2] = y, x, NUM_HEADINGS + j
            _commit(mask, t.mask[way], last[0], last[1])
            return True
    return False


@njit(nogil=True)
def _clear(mask, padding):
    size = len(mask)
    for row in range(size):
        for column in range(size):
            inner = padding <= min(row, column) and max(row, column) < size - padding
            mask[row, column] = 0 if inner else 255


@njit(nogil=True)
def two_snakes(t, rules, state, mask, paddles):
    """One attempt at both long snakes, extended in turn -> success; fills `paddles` [2, contour_length, 3]. A paddle
    enters the mask when its snake has grown by another, and of the last two only the second snake's does."""
    _clear(mask, rules.padding)
    pivots = np.zeros((2, 2), np.int64)
    tries = rules.paddle_tries
    if not _start_snake(t, mask, rules.first_frame, tries, state, paddles[0, 0], pivots[0]):
        return False
    if not _start_second_snake(t, paddles[0, 0], len(mask), tries, state, paddles[1, 0], pivots[1]):
        return False
    for i in range(1, rules.contour_length):
        for snake in range(2):
            if not _extend(t, mask, pivots[snake], tries, state, paddles[snake, i - 1], paddles[snake, i]):
                return False
    last = paddles[1, rules.contour_length - 1]
    _commit(mask, t.mask[last[2]], last[0], last[1])
    return True


@njit(nogil=True)
def distractor(t, rules, state, mask, paddles):
    """One attempt at a short snake on the free part of the image; the mask is the caller's to throw away."""
    pivot, tries = np.zeros(2, np.int64), rules.paddle_tries
    if _is_crowded(mask) or not _start_snake(t, mask, rules.distractor_frame, tries, state, paddles[0], pivot):
        return False
    for i in range(1, rules.distractor_length):
        if not _extend(t, mask, pivot, tries, state, paddles[i - 1], paddles[i]):
            return False
    last = paddles[rules.distractor_length - 1]
    _commit(mask, t.mask[last[2]], last[0], last[1])
    return True
