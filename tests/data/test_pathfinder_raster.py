"""Sprites against Pillow, whose arithmetic drew the published images."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from data.base import DataError
from data.pathfinder_raster import disc_offsets, marker_sprites, paddle_sprites

SCALE = 2
PADDLES = {32: (2, 0.5, 1), 64: (5, 1.0, 1), 128: (5, 1.5, 2), 256: (5, 2.0, 3)}  # length, thickness, margin


def angles() -> np.ndarray:
    """Every third degree, those whose sines are simple, and some that are not whole."""
    degrees = np.concatenate([np.arange(-180, 180, 3), [-90, -45, 0, 30, 45, 60, 90, 120, 135]])
    return np.concatenate([degrees * np.pi / 180, np.random.default_rng(0).uniform(-np.pi, np.pi, 30)])


def lanczos(image: np.ndarray, size: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))


def pillow_paddle(angle: float, length: int, thickness: float, margin: int) -> tuple[np.ndarray, np.ndarray]:
    reach = length + int(np.ceil(thickness)) + margin
    middle = reach * SCALE
    y, x = (int(np.ceil(middle + length * SCALE * f(angle))) for f in (np.sin, np.cos))
    image = Image.new("L", (2 * middle + 1, 2 * middle + 1))
    ImageDraw.Draw(image).line([(middle, middle), (x, y)], fill=255, width=round(thickness * SCALE))
    fine = np.array(image)
    grown = np.zeros_like(fine)
    for row, column in np.argwhere(fine):
        for dy, dx in disc_offsets(margin * SCALE):
            if 0 <= row + dy < len(fine) and 0 <= column + dx < len(fine):
                grown[row + dy, column + dx] = 255
    return lanczos(fine, 2 * reach + 1), lanczos(grown, 2 * reach + 1)


@pytest.mark.parametrize("resolution", PADDLES)
def test_paddles_and_their_occupancy_are_what_pillow_draws_byte_for_byte(resolution):
    length, thickness, margin = PADDLES[resolution]
    lines, masks = paddle_sprites(angles(), length, thickness, margin, SCALE)
    for angle, line, mask in zip(angles(), lines, masks, strict=True):
        expected_line, expected_mask = pillow_paddle(angle, length, thickness, margin)
        np.testing.assert_array_equal(line, expected_line)
        np.testing.assert_array_equal(mask, expected_mask)


@pytest.mark.parametrize(("resolution", "radius"), [(32, 1.5), (64, 2.5), (128, 3.0)])
def test_markers_are_what_pillow_reduces_byte_for_byte_also_at_the_edges(resolution, radius):
    sprites, place = marker_sprites(resolution, radius, SCALE)
    reach = sprites.shape[-1] // 2
    middle, last = resolution // 2, resolution - 1
    for y, x in [(0, 0), (1, last), (last, 3), (5, middle), (middle, middle), (middle + 3, last - 4), (7, 9)]:
        row, column = np.ogrid[-y * SCALE : (resolution - y) * SCALE, -x * SCALE : (resolution - x) * SCALE]
        disc = np.where(row**2 + column**2 <= (radius * SCALE) ** 2, 255, 0).astype(np.uint8)
        canvas = np.zeros((resolution + 2 * reach, resolution + 2 * reach), np.uint8)
        canvas[y : y + 2 * reach + 1, x : x + 2 * reach + 1] = sprites[place[y], place[x]]
        np.testing.assert_array_equal(canvas[reach:-reach, reach:-reach], lanczos(disc, resolution))


def test_a_thickness_that_is_no_whole_number_of_fine_pixels_is_refused():
    with pytest.raises(DataError, match=r"paddle_thickness 0\.7"):
        paddle_sprites(np.zeros(1), 2, 0.7, 1, SCALE)
