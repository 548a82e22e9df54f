"""Owns the settings of the Pathfinder generator and the tables that they turn into before an image is drawn."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from data.base import DataError
from data.pathfinder_raster import direction, disc_offsets, marker_sprites, paddle_sprites

NUM_HEADINGS = 360  # a first paddle points along a whole number of degrees


class Tables(NamedTuple):
    """What one paddle margin needs; O directions are the 360 headings followed by the K candidates of an extension."""

    line: np.ndarray  # [O, S, S] uint8, paddle seen from its start
    mask: np.ndarray  # [O, S, S] uint8, the same with its margin
    head: np.ndarray  # [360, 2] float64, from a first paddle's tail to its head
    pivot: np.ndarray  # [360, 2] float64, from there to the point that the snake turns about
    stride: np.ndarray  # [O, 2] float64, from one such point to the next
    candidates: np.ndarray  # [K, 2] from that point to the next paddle's head
    weights: np.ndarray  # [O, K] continuity: weight of each candidate after each direction
    near: np.ndarray  # [N, 2] disc of radius margin
    footprint: np.ndarray  # [360, F, 2] pixels that must be free for a first paddle
    footprint_size: np.ndarray  # [360] how many of them
    blocked: np.ndarray  # [360] bool, headings that never start a snake
    second: np.ndarray  # [360, 2] float64, from the first snake's tail to the second's
    marker: np.ndarray  # [C, C, M, M] uint8
    marker_class: np.ndarray  # [resolution]


class Rules(NamedTuple):
    """Settings that hold for all margins, as numbers."""

    resolution: int
    contour_length: int
    distractor_length: int
    num_distractors: int
    padding: int
    first_frame: int  # the first snake starts at least this far from the edge,
    distractor_frame: int  # and distractors this far
    paddle_tries: int
    distractor_tries: int
    paddle_contrasts: np.ndarray
    snake_contrasts: np.ndarray


@dataclass(frozen=True, kw_only=True)
class SnakeSettings:
    """The generator's parameters under their names in drewlinsley/pathfinder (ab9c130), lengths in pixels. All that the
    sources leave open is a key here. `distractor_length` None is contour_length // 3, and num_distractor_snakes is
    `distractor_paddles` // distractor_length, as in long-range-arena data/pathfinder.py.

    `border_blocks_heading` reproduces what OpenCV's dilation does there to a heading whose footprint lies outside the
    image for some place of the tail (in a corner, say): the whole image counts as taken, so no snake but the second
    ever starts along it. At 32 pixels that is 330 headings of 360, and most distractors find no place."""

    distractor_length: int | None
    distractor_paddles: int
    padding: int
    seed_distance: int
    paddle_length: int
    paddle_thickness: float
    paddle_margin_list: Sequence[int]
    continuity: float
    marker_radius: float
    antialias_scale: int
    snake_contrast_list: Sequence[float]
    paddle_contrast_list: Sequence[float]
    max_paddle_retrial: int
    max_distractor_contour_retrial: int
    border_blocks_heading: bool

    def __post_init__(self) -> None:
        for name in ("paddle_margin_list", "snake_contrast_list", "paddle_contrast_list"):
            values = tuple(getattr(self, name))
            if not values or min(values) <= 0:
                raise DataError(f"pathfinder: task.snakes.{name} is {list(values)}; give at least one number above 0.")
            object.__setattr__(self, name, values)
        for name in ("padding", "seed_distance", "paddle_length", "antialias_scale"):
            if getattr(self, name) < 1:
                raise DataError(f"pathfinder: task.snakes.{name} is {getattr(self, name)}; it must be at least 1.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for a manifest and for the name of a cache entry."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def rules(self, resolution: int, contour_length: int) -> Rules:
        """Raises DataError where contour_length, resolution and these settings do not fit together."""
        length = contour_length // 3 if self.distractor_length is None else self.distractor_length
        if length < 1:
            raise DataError(f"pathfinder: contour_length {contour_length} gives distractors of {length} paddles.")
        if 4 * self.seed_distance >= resolution:
            raise DataError(
                f"pathfinder: task.snakes.seed_distance {self.seed_distance} leaves no start for a snake at resolution "
                f"{resolution}: it must be below a quarter of it."
            )
        return Rules(
            resolution=resolution,
            contour_length=contour_length,
            distractor_length=length,
            num_distractors=self.distractor_paddles // length,
            padding=self.padding,
            first_frame=2 * self.seed_distance,
            distractor_frame=1,
            paddle_tries=self.max_paddle_retrial + 1,
            distractor_tries=self.max_distractor_contour_retrial + 1,
            paddle_contrasts=np.array(self.paddle_contrast_list, np.float64),
            snake_contrasts=np.array(self.snake_contrast_list, np.float64),
        )

    def tables(self, resolution: int, margin: int) -> Tables:
        length, headings = self.paddle_length, np.arange(-180, 180) * np.pi / 180
        candidates = _circle(length + margin)
        turned = np.arctan2(candidates[:, 0], candidates[:, 1])
        angles = np.concatenate([headings, turned])
        # An extension is drawn from its head back towards the pivot.
        drawn = np.concatenate([headings, np.where(turned < 0, turned + np.pi, turned - np.pi)])
        line, mask = paddle_sprites(drawn, length, self.paddle_thickness, margin, self.antialias_scale)
        footprint, footprint_size = _footprints(mask[:NUM_HEADINGS], length + margin)
        blocked = np.zeros(NUM_HEADINGS, bool)
        if self.border_blocks_heading:
            blocked = np.array([_misses_a_corner(f[:n]) for f, n in zip(footprint, footprint_size, strict=True)])
        marker, marker_class = marker_sprites(resolution, self.marker_radius, self.antialias_scale)
        return Tables(
            line=line,
            mask=mask,
            head=length * direction(headings),
            pivot=(length + margin) * direction(np.where(headings < 0, headings + np.pi, headings - np.pi)),
            stride=(length + 2 * margin) * direction(angles),
            candidates=candidates,
            weights=_continuity_weights(angles, turned, self.continuity),
            near=disc_offsets(margin),
            footprint=footprint,
            footprint_size=footprint_size,
            blocked=blocked,
            second=self.seed_distance * direction(np.arange(360) * np.pi / 180),
            marker=marker,
            marker_class=marker_class,
        )


def _circle(radius: int) -> np.ndarray:
    """[K, 2] distinct pixels of a circle sampled at steps of one pixel, in order of row and column."""
    angle = np.arange(0, 360, 360 / (2 * np.pi * radius)) * np.pi / 180
    return np.unique(np.floor(radius * direction(angle)).astype(np.int64), axis=0)


def _continuity_weights(angles: np.ndarray, turned: np.ndarray, continuity: float) -> np.ndarray:
    """[O, K]: cos(min(continuity |turn|, pi/2))^2."""
    turn = np.abs(angles[:, None] - turned)
    turn = np.minimum(np.minimum(turn, 2 * np.pi - turn) * continuity, np.pi / 2)
    weights = np.cos(turn) ** 2
    return np.where(weights > 1e-12, weights, 0.0)


def _footprints(mask: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """[360, F, 2] and [360]: where a paddle's occupancy is full, inside the square of half-width `half` about a centre
    that lies one pixel up and left of the tail (snakes2.py:115-130 puts the tail off the centre)."""
    reach = mask.shape[1] // 2
    offsets = [np.argwhere(sprite == 255) - reach + 1 for sprite in mask]
    offsets = [offset[(np.abs(offset) <= half).all(axis=1)] for offset in offsets]
    size = np.array([len(offset) for offset in offsets])
    if size.min() == 0:
        raise DataError(
            "pathfinder: task.snakes.paddle_thickness and paddle_margin_list are too small to occupy a pixel."
        )
    footprint = np.zeros((len(mask), size.max(), 2), np.int64)
    for padded, offset in zip(footprint, offsets, strict=True):
        padded[: len(offset)] = offset
    return footprint, size


def _misses_a_corner(footprint: np.ndarray) -> bool:
    """Whether all of the footprint [F, 2] can lie outside an image that contains the tail."""
    y, x = np.sign(footprint).T
    return not all(((y * down <= 0) & (x * right <= 0)).any() for down in (-1, 1) for right in (-1, 1))
