"""The figure of accuracy against resolution."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Sequence

import numpy as np
from matplotlib.figure import Figure

from .plots import MARKERS, save_figure

if TYPE_CHECKING:
    from vmamba.tools.validate import Row


def resolution_lines(rows: Sequence[Row]) -> Dict[str, List[Row]]:
    """The rows of each line by its label: the model, and its weights where several have been measured."""
    pairs = list(dict.fromkeys((row.model, row.weights) for row in rows))
    models = [model for model, _ in pairs]
    lines = {}
    for pair in pairs:
        label = pair[0] if models.count(pair[0]) == 1 else ', '.join(pair)
        lines[label] = [row for row in rows if (row.model, row.weights) == pair]
    return lines


def plot_resolutions(rows: Sequence[Row], path: Path) -> None:
    """Top-1 accuracy against the images' side, a line a model, the mean of several folders; crosses are published."""
    figure = Figure(figsize=(7, 4.2), layout='constrained')
    panel = figure.subplots()
    for i, (label, own) in enumerate(resolution_lines(rows).items()):
        measured: Dict[int, List[float]] = {}
        for row in own:
            measured.setdefault(row.img_size, []).append(row.top1)
        sizes = sorted(measured)
        heights = [float(np.mean(measured[size])) for size in sizes]
        panel.plot(sizes, heights, marker=MARKERS[i % len(MARKERS)], color=f'C{i % 10}', label=label)
        known = [(row.img_size, row.published_top1) for row in own if row.published_top1 is not None]
        if known:
            panel.scatter(*zip(*known), marker='x', color=f'C{i % 10}', label=f'{label}, published (ImageNet-1K val)')
    panel.set_xticks(sorted({row.img_size for row in rows}))
    panel.set_xlabel('image size, pixels')
    panel.set_ylabel('top-1 accuracy, %')
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save_figure(figure, path)
