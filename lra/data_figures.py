"""Owns the pictures of a data card: lengths, labels and ids of the splits, and contact sheets of images."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from data.base import SPLITS, Task

_COLOURS = {"train": "#0072B2", "val": "#E69F00", "test": "#009E73"}
_SAMPLE = 2000  # sequences behind the histogram of ids


def draw_statistics(task: Task, path: Path) -> Path:
    """Three panels: lengths, classes, ids. The colours are those of the splits."""
    figure, (lengths, labels, ids) = plt.subplots(1, 3, figsize=(13, 3.5), layout="constrained")
    _draw_lengths(lengths, task)
    _draw_labels(labels, task)
    _draw_ids(ids, task)
    for panel in (lengths, labels, ids):
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    figure.legend(*labels.get_legend_handles_labels(), fontsize=9, frameon=False, loc="outside lower center", ncols=3)
    return _save(figure, path)


def draw_contact_sheet(task: Task, path: Path, rows: int, columns: int) -> Path:
    """The first images of the test split with their labels; every pixel becomes the same number of screen pixels."""
    data, side = task.split("test"), task.image_side
    assert side is not None
    scale = max(1, 96 // side)
    figure, panels = plt.subplots(rows, columns, figsize=(1.15 * columns, 1.35 * rows), layout="constrained")
    for number, panel in enumerate(panels.flat):
        panel.axis("off")
        if number < len(data):
            image = np.asarray(data.tokens[data.offsets[number] : data.offsets[number + 1]]).reshape(side, side)
            panel.imshow(np.kron(image, np.ones((scale, scale))), cmap="gray", vmin=0, vmax=255, interpolation="none")
            panel.set_title(f"label {data.labels[number]}", fontsize=7, pad=2)
    return _save(figure, path)


def _draw_lengths(panel: Axes, task: Task) -> None:
    lengths = {split: task.split(split).lengths().ravel() for split in SPLITS}
    panel.set_title("sequence length", fontsize=10)
    if len({int(edge) for values in lengths.values() for edge in (values.min(), values.max())}) == 1:
        panel.text(0.5, 0.5, f"all {lengths['train'][0]:,} tokens", ha="center", va="center", fontsize=11)
        panel.set_axis_off()
        return
    edges = np.linspace(0, max(values.max() for values in lengths.values()), 61)
    for split, values in lengths.items():
        shares = np.histogram(values, edges)[0] / len(values)
        panel.stairs(100 * shares, edges, color=_COLOURS[split], linewidth=1.3, label=split)
    panel.set_xlabel("tokens", fontsize=8)
    panel.set_ylabel("% of sequences", fontsize=8)


def _draw_labels(panel: Axes, task: Task) -> None:
    places = np.arange(task.num_classes)
    for number, split in enumerate(SPLITS):
        data = task.split(split)
        shares = np.bincount(data.labels, minlength=task.num_classes) / len(data)
        panel.bar(places + (number - 1) * 0.27, 100 * shares, 0.27, color=_COLOURS[split], label=split)
    panel.set_xticks(places)
    panel.set_title("classes", fontsize=10)
    panel.set_xlabel("label", fontsize=8)
    panel.set_ylabel("% of examples", fontsize=8)


def _draw_ids(panel: Axes, task: Task) -> None:
    for split in SPLITS:
        data = task.split(split)
        last = data.offsets[min(_SAMPLE, len(data.offsets) - 1)]
        counts = np.bincount(np.asarray(data.tokens[:last]), minlength=2)
        used = np.arange(len(counts))
        panel.plot(used, 100 * counts / counts.sum(), color=_COLOURS[split], linewidth=1.1, drawstyle="steps-mid")
    panel.set_yscale("log")
    panel.set_title(f"token ids (first {_SAMPLE:,} sequences)", fontsize=10)
    panel.set_xlabel("grey value" if task.image_side else "id", fontsize=8)
    panel.set_ylabel("% of tokens", fontsize=8)


def _save(figure: plt.Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path
