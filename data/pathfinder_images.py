"""Owns the drawing of Pathfinder images: snakes, distractors and markers, one above the other, stretched to 0..255."""

import numpy as np
from numba import njit

from data.pathfinder_snakes import below, distractor, two_snakes

MAX_RESTARTS = 500_000  # over a hundred times what the published settings need on average


@njit(nogil=True)
def _paint(canvas, sprite, y, x, contrast):
    reach = len(sprite) // 2
    for row in range(max(y - reach, 0), min(y + reach + 1, len(canvas))):
        for column in range(max(x - reach, 0), min(x + reach + 1, len(canvas))):
            value = sprite[row - y + reach, column - x + reach] * contrast
            if value > canvas[row, column]:
                canvas[row, column] = value


@njit(nogil=True)
def _paint_paddle(canvas, line, paddle, contrast):
    _paint(canvas, line[paddle[2]], paddle[0], paddle[1], contrast)


@njit(nogil=True)
def _paint_snakes(t, rules, state, canvas, paddles):
    """Both snakes have a contrast each, drawn without replacement from the list twice over; paddles number i of both
    share another factor."""
    count = len(rules.snake_contrasts)
    one = below(state, 2 * count)
    other = (one + 1 + below(state, 2 * count - 1)) % (2 * count)
    for i in range(rules.contour_length):
        factor = rules.paddle_contrasts[below(state, len(rules.paddle_contrasts))]
        _paint_paddle(canvas, t.line, paddles[0, i], factor * rules.snake_contrasts[one % count])
        _paint_paddle(canvas, t.line, paddles[1, i], factor * rules.snake_contrasts[other % count])


@njit(nogil=True)
def _add_distractor(t, rules, state, canvas, mask, trial, paddles):
    """Put one short snake where there is room, within the allowed attempts -> success."""
    for _ in range(rules.distractor_tries):
        _copy(mask, trial)
        if distractor(t, rules, state, trial, paddles):
            _copy(trial, mask)
            for i in range(rules.distractor_length):
                contrast = rules.snake_contrasts[below(state, len(rules.snake_contrasts))]
                _paint_paddle(canvas, t.line, paddles[i], contrast)
            return True
    return False


@njit(nogil=True)
def _copy(source, target):
    for row in range(len(source)):
        for column in range(len(source)):
            target[row, column] = source[row, column]


@njit(nogil=True)
def _stretch(canvas, image):
    """Smallest value to 0, largest to 255, as scipy.misc.imsave did; leaves the canvas black."""
    low, high = np.inf, -np.inf
    for row in range(len(canvas)):
        for column in range(len(canvas)):
            low, high = min(low, canvas[row, column]), max(high, canvas[row, column])
    for row in range(len(canvas)):
        for column in range(len(canvas)):
            image[row, column] = int((canvas[row, column] - low) * (255.0 / (high - low)) + 0.5)
            canvas[row, column] = 0.0


@njit(nogil=True)
def draw_images(t, rules, margin, num_margins, streams, images, labels, markers, restarts, distractors):
    """Draw those of N images whose margin is number `margin` of `num_margins`. `streams` [N] uint64 seeds one random
    stream each; fills images [N, R, R] uint8, labels [N], markers [N, 2, 2] (tips), restarts [N] (-1: gave up) and
    distractors [N] (how many of the short snakes found room)."""
    state = np.zeros(1, np.uint64)
    mask = np.empty((rules.resolution, rules.resolution), np.uint8)
    trial = np.empty_like(mask)
    canvas = np.zeros((rules.resolution, rules.resolution))
    paddles = np.zeros((2, rules.contour_length, 3), np.int64)
    short = np.zeros((rules.distractor_length, 3), np.int64)
    for n in range(len(images)):
        state[0] = streams[n]
        labels[n] = below(state, 2)
        if below(state, num_margins) != margin:
            continue
        restarts[n] = 0
        while not two_snakes(t, rules, state, mask, paddles):
            restarts[n] += 1
            if restarts[n] == MAX_RESTARTS:
                restarts[n] = -1
                return
        _paint_snakes(t, rules, state, canvas, paddles)
        distractors[n] = 0
        for _ in range(rules.num_distractors):
            distractors[n] += _add_distractor(t, rules, state, canvas, mask, trial, short)
        origin = below(state, 2)
        terminal = origin if labels[n] == 1 else 1 - origin
        for i in range(2):
            markers[n, 0, i] = paddles[origin, 0, i]
            markers[n, 1, i] = paddles[terminal, rules.contour_length - 1, i]
        for i in range(2):
            y, x = markers[n, i, 0], markers[n, i, 1]
            _paint(canvas, t.marker[t.marker_class[y], t.marker_class[x]], y, x, 1.0)
        _stretch(canvas, images[n])
