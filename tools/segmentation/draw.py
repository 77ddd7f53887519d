"""Predictions as pictures: contours of the classes over the image."""

from pathlib import Path
from typing import List, Tuple

import numpy as np

from vmamba.tools.figures.plots import save_figure

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


def draw_case(image: np.ndarray, label: np.ndarray, predicted: np.ndarray, title: str, path: Path) -> None:
    """Writes a PNG file with the contours of a mask and of a prediction over the image.

    A volume is shown in the three planes through the middle of its labelled voxels. The image [C, ...] may have any
    range; one channel is drawn in grey, of more the first three in colour.
    """
    planes = _planes(label if label.any() else predicted)
    figure = Figure(figsize=(8, 8.6) if len(planes) == 1 else (5 * len(planes), 5.6), layout='constrained')
    for panel, plane in zip(figure.subplots(1, len(planes), squeeze=False)[0], planes):
        _draw_plane(panel, image[(slice(None), *plane)], label[plane], predicted[plane])
    styles = {'mask (dark)': 'solid', 'prediction (light)': 'dashed'}
    lines = [Line2D([], [], color='black', linestyle=style, label=name) for name, style in styles.items()]
    figure.legend(handles=lines, loc='outside lower center', ncols=2, frameon=False)
    figure.suptitle(title.replace('$', r'\$'), fontsize=11)
    save_figure(figure, path, dpi=100)


def _planes(mask: np.ndarray) -> List[Tuple]:
    """Indices of the planes to draw."""
    if mask.ndim == 2:
        return [(slice(None), slice(None))]
    places = np.argwhere(mask)
    middle = places.mean(axis=0).round().astype(int) if len(places) else np.array(mask.shape) // 2
    return [tuple(int(middle[axis]) if axis == fixed else slice(None) for axis in range(3)) for fixed in range(3)]


def _draw_plane(panel: Axes, image: np.ndarray, label: np.ndarray, predicted: np.ndarray) -> None:
    low, high = np.percentile(image, [1, 99])
    pixels = ((image - low) / max(high - low, 1e-6)).clip(0, 1)
    panel.imshow(pixels[0] if len(image) < 3 else np.moveaxis(pixels[:3], 0, -1), cmap='gray')
    for light, (mask, style) in enumerate(((label, 'solid'), (predicted, 'dashed'))):
        for number in np.unique(mask[mask > 0]):
            color = colormaps['tab20'](2 * (int(number) - 1) % 20 + light)  # pairs of a dark and a light colour
            panel.contour(mask == number, levels=[0.5], colors=[color], linestyles=style, linewidths=1.2)
    panel.set_axis_off()
