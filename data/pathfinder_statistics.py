"""Owns what is measured on Pathfinder images: how they look, and what predicts their label without following a path."""

from typing import Any

import numpy as np

INK = 64  # grey values from here on count as drawn


def statistics(
    images: np.ndarray,
    labels: np.ndarray,
    markers: np.ndarray | None = None,
    restarts: np.ndarray | None = None,
    distractors: np.ndarray | None = None,
) -> dict[str, Any]:
    """Of images [N, R, R] uint8 and labels [N]; the rest as in data.pathfinder_generator.Drawn, where known.

    `shortcut_*` are accuracies of predictors that never follow a path, fitted on the first half and counted on the
    second: of the mean brightness, of the histogram of grey values, of the distance between the markers. A half of n
    images has a standard error of 0.5 / sqrt(n), which is `shortcut_standard_error`."""
    brightness = images.mean(axis=(1, 2))
    found = {
        "images": len(images),
        "label_mean": float(labels.mean()),
        "ink_fraction": float((images >= INK).mean()),
        "brightness_mean": float(brightness.mean()),
        "brightness_by_label": [float(brightness[labels == label].mean()) for label in (0, 1)],
        "shortcut_brightness": _scalar_shortcut(brightness, labels),
        "shortcut_histogram": _linear_shortcut(_histograms(images), labels),
        "shortcut_standard_error": 0.5 / (len(labels) - len(labels) // 2) ** 0.5,
    }
    if markers is not None:
        distance = np.linalg.norm((markers[:, 0] - markers[:, 1]).astype(float), axis=1)
        found["marker_distance_mean"] = float(distance.mean())
        found["marker_distance_by_label"] = [float(distance[labels == label].mean()) for label in (0, 1)]
        found["shortcut_marker_distance"] = _scalar_shortcut(distance, labels)
    if restarts is not None:
        found["restarts_mean"], found["restarts_max"] = float(restarts.mean()), int(restarts.max())
    if distractors is not None:
        found["distractors_mean"] = float(distractors.mean())
    return found


def _histograms(images: np.ndarray) -> np.ndarray:
    """[N, bins]: how many of an image's pixels lie in each range of grey values."""
    return np.stack([np.bincount(image.ravel() >> 3, minlength=256 >> 3) for image in images])


def _scalar_shortcut(values: np.ndarray, labels: np.ndarray) -> float:
    """The majority label in each of twenty ranges of equal weight: any function of one number, roughly."""
    half = len(values) // 2
    edges = np.quantile(values[:half], np.arange(1, 20) / 20)
    place = np.searchsorted(edges, values, side="right")
    votes = np.bincount(place[:half], weights=2.0 * labels[:half] - 1.0, minlength=20)
    return float(((votes[place[half:]] > 0) == labels[half:]).mean())


def _linear_shortcut(features: np.ndarray, labels: np.ndarray) -> float:
    """Ridge regression onto the label, cut at one half."""
    half = len(features) // 2
    center, scale = features[:half].mean(axis=0), features[:half].std(axis=0) + 1e-12
    inputs = np.hstack([(features - center) / scale, np.ones((len(features), 1))])
    gram = inputs[:half].T @ inputs[:half] + 1e-3 * half * np.eye(inputs.shape[1])
    weights = np.linalg.solve(gram, inputs[:half].T @ labels[:half].astype(float))
    return float(((inputs[half:] @ weights > 0.5) == labels[half:]).mean())
