"""The figures of the tools."""

from __future__ import annotations

from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import pandas as pd

from vmamba.tools.features.receptive_field import Field
from vmamba.tools.images.decoding import read_image
from vmamba.tools.output_files import write_atomically

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

MARKERS = 'osD^vPX*'
PANEL = 2.7  # inches, of maps


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Writes a PNG file, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format='png', dpi=dpi))


def _style(i: int) -> Dict[str, str]:
    """Marker and colour of line number i."""
    return dict(marker=MARKERS[i % len(MARKERS)], color=f'C{i % 10}')


def plot_comparison(rows: pd.DataFrame, title: str, path: Path) -> None:
    """Throughput and peak memory against resolution, a line a label; crosses at the edge mark what did not run.

    The rows have the columns label, size, batch_size, status, images_per_second and peak_mib.
    """
    figure = Figure(figsize=(11, 5.2), layout='constrained')
    panels = figure.subplots(1, 2)
    crossed = 0
    for i, (label, own) in enumerate(rows.groupby('label', sort=False)):
        done, missing = own[own.status == 'ok'], own[own.status != 'ok']
        what = ', '.join(f'{row.status} at {row.size}' for row in missing.itertuples())
        style = dict(_style(i), label=f'{label} (× {what})' if what else label)
        panels[0].plot(done['size'], done.images_per_second, **style)
        panels[1].plot(done['size'], done.peak_mib, **style)
        for panel, edge in zip(panels, (0.03 + 0.04 * crossed, 0.97 - 0.04 * crossed)):  # slow, and much memory
            heights, transform = [edge] * len(missing), panel.get_xaxis_transform()
            panel.scatter(missing['size'], heights, marker='x', color=style['color'], transform=transform)
        crossed += bool(len(missing))
    batches = rows.groupby('size').batch_size.unique()
    ticks = {size: f'{size}\nbatch {", ".join(map(str, sorted(found)))}' for size, found in batches.items()}
    _log_panel(panels[0], ticks, 'images per second')
    _log_panel(panels[1], ticks, 'peak memory of the forward, MiB')
    figure.suptitle(title, fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
    save_figure(figure, path)


def _log_panel(panel: Axes, ticks: Dict[int, str], ylabel: str) -> None:
    panel.set_xscale('log')
    panel.set_xticks(list(ticks), ticks.values(), fontsize=9)
    panel.minorticks_off()
    if any(value > 0 for line in panel.lines for value in line.get_ydata()):  # nothing may have run
        panel.set_yscale('log')
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set(xlabel='image size, pixels', ylabel=ylabel)
    panel.grid(alpha=0.3)


def plot_run(history: Sequence[Dict[str, float]], path: Path) -> None:
    """Losses and scores of a training run after each epoch; what a run has not measured is left out."""
    accuracies = {'val_top1': 'top-1', 'val_top5': 'top-5', 'ema_top1': 'top-1, average of weights'}
    scores = {'validation accuracy, %': accuracies}
    if any('val_dice' in row for row in history):
        scores = {'validation Dice': {'val_dice': 'mean over classes'}}
    panels_of = {'loss': {'train_loss': 'training', 'val_loss': 'validation'}, **scores}
    figure = Figure(figsize=(9, 3.8), layout='constrained')
    for panel, (ylabel, curves) in zip(figure.subplots(1, 2), panels_of.items()):
        for key, label in curves.items():
            rows = [row for row in history if key in row]
            if rows:
                panel.plot([row['epoch'] for row in rows], [row[key] for row in rows], marker='.', label=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set(xlabel='epoch', ylabel=ylabel)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    save_figure(figure, path)


def plot_accuracies(epochs: pd.DataFrame, title: str, path: Path, required: Optional[float] = None) -> None:
    """Validation accuracy against epoch: the mean over the runs of a model, and a band from the worst to the best.

    The epochs are those of all runs, with the columns model, epoch and val_top1.
    """
    figure = Figure(figsize=(7, 5), layout='constrained')
    panel = figure.subplots()
    for i, (model, runs) in enumerate(epochs.groupby('model', sort=False)):
        found = runs.groupby('epoch').val_top1.agg(['mean', 'min', 'max'])
        panel.plot(found['mean'], label=model, markersize=4, markevery=max(len(found) // 8, 1), **_style(i))
        panel.fill_between(found.index, found['min'], found['max'], color=f'C{i % 10}', alpha=0.2)
    if required is not None:
        panel.axhline(required, linestyle='--', color='grey', label=f'required: {required:g} %')
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_title(title, fontsize=11)
    panel.set(xlabel='epoch', ylabel='validation accuracy, %')
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save_figure(figure, path)


def plot_resolutions(lines: Dict[str, pd.Series], published: Dict[str, pd.Series], path: Path) -> None:
    """Top-1 accuracy by the side of the images, a line for each label; crosses are published values."""
    figure = Figure(figsize=(7, 4.2), layout='constrained')
    panel = figure.subplots()
    for i, (label, values) in enumerate(lines.items()):
        panel.plot(values, label=label, **_style(i))
        if len(published[label]):
            name = f'{label}, published (ImageNet-1K val)'
            panel.plot(published[label], 'x', label=name, color=f'C{i % 10}')
    panel.set_xticks(sorted({size for values in lines.values() for size in values.index}))
    panel.set(xlabel='image size, pixels', ylabel='top-1 accuracy, %')
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    save_figure(figure, path)


def plot_generation(rows: pd.DataFrame, path: Path) -> None:
    """Time of a step and memory of weights and cache against the length of the text before, a line for each model.

    The rows have the columns model, length, ms_per_step, cache_mib and weights_mib.
    """
    figure = Figure(figsize=(9, 3.8), layout='constrained')
    panels = figure.subplots(1, 2)
    for i, (model, own) in enumerate(rows.groupby('model', sort=False)):
        panels[0].plot(own.length, own.ms_per_step, label=model, **_style(i))
        panels[1].plot(own.length, own.cache_mib + own.weights_mib, **_style(i))
    for panel, ylabel in zip(panels, ('ms per step', 'weights and cache, MiB')):
        panel.set_xscale('log', base=2)
        panel.set(yscale='log', xlabel='tokens before', ylabel=ylabel)
        panel.grid(alpha=0.3)
    panels[0].legend()
    save_figure(figure, path)


def plot_predictions(predictions: Sequence[Tuple[Path, List[Tuple[str, float]]]], path: Path) -> None:
    """Every image beside bars of its most probable classes."""
    figure = Figure(figsize=(9, 3 * len(predictions)), layout='constrained')
    for (image, classes), (left, right) in zip(predictions, figure.subplots(len(predictions), 2, squeeze=False)):
        pixels = read_image(image)
        pixels.thumbnail((512, 512))
        left.imshow(pixels)
        left.set_axis_off()
        left.set_title(image.name.replace('$', r'\$'), fontsize=9)
        right.barh(range(len(classes)), [value for _, value in classes])
        right.set_yticks(range(len(classes)), [name.replace('$', r'\$')[:40] for name, _ in classes], fontsize=8)
        right.set_xlim(0, 1)
        right.set_xlabel('probability', fontsize=8)
        right.invert_yaxis()
    save_figure(figure, path)


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
            panel.set(xticks=[], yticks=[])
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
            height, width = image.shape[:2]
            panel.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
            if pixel is not None:
                panel.plot(*pixel, marker='+', color='cyan', markersize=9)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=130)


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
