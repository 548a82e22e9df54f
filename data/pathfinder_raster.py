"""Owns the pictures that Pathfinder images are pasted together from: paddles, their occupancy, and markers, 8 bit each.

The generator of the benchmark draws at `antialias_scale` times the resolution and reduces with Pillow's Lanczos filter.
Here the same arithmetic is done in integers, so that a seed names the same bytes under every version of Pillow; the
tests compare with Pillow itself. A paddle has one of a few hundred directions, so all of them are drawn beforehand.
"""

import math
from functools import lru_cache

import numpy as np

from data.base import DataError

_LANCZOS_LOBES = 3
_FIXED_POINT_BITS = 22  # Pillow's 8-bit resampling works with weights of 22 fractional bits


def direction(angle: np.ndarray | float) -> np.ndarray:
    """[..., 2]: unit vectors (down, right) of angles in radians."""
    return np.stack([np.sin(angle), np.cos(angle)], axis=-1)


@lru_cache(maxsize=8)
def _lanczos_matrix(large: int, small: int) -> np.ndarray:
    """[small, large] int64 weights of a Lanczos-3 reduction, times 2^22; cut off at the ends and summing to one."""
    scale = large / small
    support = _LANCZOS_LOBES * max(scale, 1.0)
    matrix = np.zeros((small, large))
    for row in range(small):
        center = (row + 0.5) * scale
        first, last = max(int(center - support + 0.5), 0), min(int(center + support + 0.5), large)
        distance = (np.arange(first, last) - center + 0.5) / max(scale, 1.0)
        weight = np.sinc(distance) * np.sinc(distance / _LANCZOS_LOBES)
        weight[np.abs(distance) >= _LANCZOS_LOBES] = 0.0
        matrix[row, first:last] = weight / weight.sum()
    return np.trunc(matrix * (1 << _FIXED_POINT_BITS) + np.copysign(0.5, matrix)).astype(np.int64)


def reduce_image(image: np.ndarray, size: int) -> np.ndarray:
    """Square uint8 [n, n] -> [size, size] uint8: rows first, then columns, 8 bits in between, as Pillow does."""
    weights = _lanczos_matrix(len(image), size)
    half = 1 << (_FIXED_POINT_BITS - 1)
    rows = np.clip((image.astype(np.int64) @ weights.T + half) >> _FIXED_POINT_BITS, 0, 255)
    return np.clip((weights @ rows + half) >> _FIXED_POINT_BITS, 0, 255).astype(np.uint8)


def _draw_thin_line(canvas: np.ndarray, start: np.ndarray, end: np.ndarray) -> None:
    """The nearest pixel in each step along the longer axis, halves away from the start (Bresenham's line)."""
    delta = end - start
    steps = int(np.abs(delta).max())
    along = np.arange(steps + 1)[:, None]
    places = start + np.sign(delta) * ((2 * along * np.abs(delta) + steps) // max(2 * steps, 1))
    canvas[places[:, 0], places[:, 1]] = 255


def _draw_wide_line(canvas: np.ndarray, start: np.ndarray, end: np.ndarray, width: int) -> None:
    """A filled rectangle whose corners, `(width - 1) / 2` to either side, are rounded to whole pixels."""
    delta = end - start
    normal = np.array([delta[1], -delta[0]]) / math.hypot(*delta)
    half = (width - 1) / 2
    up, down = math.floor(half + 0.5), math.ceil(half - 0.5)  # unequal for an even width: Pillow's corners are skewed
    near = _round_half_down(np.array([up, down]) * normal)
    far = _round_half_down(np.array([down, up]) * normal)
    corners = np.array([start + near, end + near, end - far, start - far])
    for row in range(corners[:, 0].min(), corners[:, 0].max() + 1):
        crossings = []
        for (y0, x0), (y1, x1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            if y0 == y1 == row:
                crossings += [x0, x1]
            elif min(y0, y1) <= row <= max(y0, y1):
                crossings.append(x0 + (row - y0) * (x1 - x0) / (y1 - y0))
        canvas[row, math.floor(min(crossings) + 0.5) : math.ceil(max(crossings) - 0.5) + 1] = 255


def _round_half_down(value: np.ndarray) -> np.ndarray:
    return (np.sign(value) * np.ceil(np.abs(value) - 0.5)).astype(np.int64)


def disc_offsets(radius: int) -> np.ndarray:
    """[n, 2]: the pixels whose centre is at most `radius` away."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.argwhere(x * x + y * y <= radius * radius) - radius


def _dilate(canvas: np.ndarray, radius: int) -> np.ndarray:
    padded = np.pad(canvas, radius)
    size = len(canvas)
    return np.max(
        [padded[radius + y : radius + y + size, radius + x : radius + x + size] for y, x in disc_offsets(radius)],
        axis=0,
    )


def paddle_sprites(
    angles: np.ndarray, length: int, thickness: float, margin: int, scale: int
) -> tuple[np.ndarray, np.ndarray]:
    """Paddles that start in the middle and run along `angles` [O] -> drawing and occupancy, both [O, 2R+1, 2R+1] uint8.
    Occupancy is the paddle grown by `margin` pixels. Raises DataError when thickness * scale is not whole."""
    width = round(thickness * scale)
    if width != thickness * scale or width < 1:
        raise DataError(
            f"pathfinder: task.snakes.paddle_thickness {thickness} times antialias_scale {scale} must be a whole number above 0."
        )
    reach = length + math.ceil(thickness) + margin
    middle = np.array([reach * scale, reach * scale])
    lines, masks = [], []
    for angle in angles:
        canvas = np.zeros((2 * reach * scale + 1, 2 * reach * scale + 1), np.uint8)
        end = np.ceil(middle + length * scale * direction(angle)).astype(np.int64)
        if width == 1:
            _draw_thin_line(canvas, middle, end)
        else:
            _draw_wide_line(canvas, middle, end, width)
        lines.append(reduce_image(canvas, 2 * reach + 1))
        masks.append(reduce_image(_dilate(canvas, margin * scale), 2 * reach + 1))
    return np.stack(lines), np.stack(masks)


def marker_sprites(resolution: int, radius: float, scale: int) -> tuple[np.ndarray, np.ndarray]:
    """Discs for every place of an image -> (sprites [C, C, 2R+1, 2R+1] uint8, class of each row or column [resolution]).
    The filter is cut off at the image's edge, so places near an edge have sprites of their own."""
    reach = math.ceil(radius) + _LANCZOS_LOBES
    edge = reach + _LANCZOS_LOBES
    window = min(resolution, 2 * edge + 1)
    place = np.arange(resolution)
    place = np.where(place >= window // 2, np.maximum(place - (resolution - window), window // 2), place)
    sprites = np.zeros((window, window, 2 * reach + 1, 2 * reach + 1), np.uint8)
    fine = np.arange(window * scale)
    for row in range(window):
        for column in range(window):
            distance = (fine[:, None] - row * scale) ** 2 + (fine - column * scale) ** 2
            disc = np.where(distance <= (radius * scale) ** 2, 255, 0).astype(np.uint8)
            padded = np.pad(reduce_image(disc, window), reach)
            sprites[row, column] = padded[row : row + 2 * reach + 1, column : column + 2 * reach + 1]
    return sprites, place
