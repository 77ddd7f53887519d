"""The figures of tools/visualize.py."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np

from vmamba.tools.features.receptive_field import Field

from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from .plots import save_figure

PANEL = 2.7  # inches


class Layer(NamedTuple):
    """What a figure shows of one layer.

    Attributes:
        name: Of the block.
        maps: Weights [routes + 1, h, w], the last the routes' sum.
        extent: Pixels (left, right, bottom, top) of the image that the map covers.
    """

    name: str
    maps: np.ndarray
    extent: Tuple[float, float, float, float]


def plot_receptive_fields(fields: Dict[str, Dict[str, Field]], title: str, path: Path) -> None:
    """A row of panels for each set of weights, a column for each map; every panel has a scale of its own."""
    columns = list(next(iter(fields.values())))
    figure = Figure(figsize=(PANEL * len(columns), (PANEL + 0.4) * len(fields) + 0.3), layout='constrained')
    panels = figure.subplots(len(fields), len(columns), squeeze=False)
    for row, (label, found) in zip(panels, fields.items()):
        for panel, name in zip(row, columns):
            values = found[name].values
            panel.imshow(values / max(values.max(), 1e-30), norm=PowerNorm(0.25, vmin=0, vmax=1), cmap='magma')
            sides = ', '.join(f'{share:.0%} in {side}' for share, side in found[name].sides.items())
            panel.set_title(f'{name}\n{sides} px', fontsize=8)
            panel.set_xticks([])
            panel.set_yticks([])
        row[0].set_ylabel(label, fontsize=9)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=130)


def plot_attention(
    image: np.ndarray,
    layers: List[Layer],
    routes: List[str],
    pixel: Optional[Tuple[int, int]],
    gamma: float,
    title: str,
    path: Path,
) -> None:
    """A row of panels for each layer: the image, then the weights of each route and of all over the image.

    Args:
        image: [H, W, 3] in 0 to 1.
        pixel: Column and row of the marked pixel; None for none.
        gamma: Weights are drawn as (weight / largest) ** gamma.
    """
    columns = [*routes, 'all']
    figure = Figure(figsize=(PANEL * (len(columns) + 1), 0.85 * PANEL * len(layers) + 0.4), layout='constrained')
    panels = figure.subplots(len(layers), len(columns) + 1, squeeze=False)
    for row, layer in zip(panels, layers):
        row[0].imshow(image)
        row[0].set_ylabel(layer.name, fontsize=9)
        for panel, name, weights in zip(row[1:], columns, layer.maps):
            panel.imshow(image.mean(axis=-1), cmap='gray', vmin=0, vmax=1)
            norm = PowerNorm(gamma, vmin=0, vmax=max(weights.max(), 1e-30))
            drawn = panel.imshow(weights, norm=norm, cmap='inferno', alpha=0.65, extent=layer.extent)
            panel.set_title(name, fontsize=9)
            figure.colorbar(drawn, ax=panel, shrink=0.8).ax.tick_params(labelsize=6)
        for panel in row:
            panel.set_xlim(-0.5, image.shape[1] - 0.5)
            panel.set_ylim(image.shape[0] - 0.5, -0.5)
            panel.set_xticks([])
            panel.set_yticks([])
            if pixel is not None:
                panel.plot(*pixel, marker='+', color='cyan', markersize=9)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=130)
