"""The figures of the tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from vmamba.tools.output_files import write_atomically

if TYPE_CHECKING:  # so that a comparison needs no digits
    from vmamba.tools.benchmarks.measure import Case, Result
    from vmamba.tools.images.digits import Epoch

MARKERS = 'osD^vPX*'


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Writes a PNG file, whole or not at all."""
    write_atomically(path, lambda file: figure.savefig(file, format='png', dpi=dpi))


def plot_comparison(lines: Dict[str, Sequence[Tuple[Case, Result]]], title: str, path: Path) -> None:
    """Throughput and peak memory against resolution, a line a label; crosses at the edge mark what did not run.

    Args:
        lines: Measurements by label.
        title: Above the panels.
        path: Of the picture.
    """
    figure = Figure(figsize=(11, 5.2), layout='constrained')
    panels = figure.subplots(1, 2)
    crossed = 0
    for i, (label, rows) in enumerate(lines.items()):
        sizes = [case.size for case, result in rows if result.status == 'ok']
        results = [result for _, result in rows if result.status == 'ok']
        style = dict(marker=MARKERS[i % len(MARKERS)], color=f'C{i % 10}', label=_label(label, rows))
        panels[0].plot(sizes, [result.images_per_second for result in results], **style)
        panels[1].plot(sizes, [result.peak_mib for result in results], **style)
        missing = [case.size for case, result in rows if result.status != 'ok']
        for panel, edge in zip(panels, (0.03 + 0.04 * crossed, 0.97 - 0.04 * crossed)):  # slow, and much memory
            heights = [edge] * len(missing)
            panel.scatter(missing, heights, marker='x', color=style['color'], transform=panel.get_xaxis_transform())
        crossed += bool(missing)
    ticks = _size_labels([case for rows in lines.values() for case, _ in rows])
    _log_panel(panels[0], ticks, 'images per second')
    _log_panel(panels[1], ticks, 'peak memory of the forward, MiB')
    figure.suptitle(title, fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
    save_figure(figure, path)


def _label(label: str, rows: Sequence[Tuple[Case, Result]]) -> str:
    missing = [f'{result.status} at {case.size}' for case, result in rows if result.status != 'ok']
    return f'{label} (\u00d7 {", ".join(missing)})' if missing else label


def _size_labels(cases: Sequence[Case]) -> Dict[int, str]:
    """Text at each size on the axis: the size and its batch."""
    batches: Dict[int, List[str]] = {}
    for case in sorted(cases, key=lambda case: (case.size, case.batch_size)):
        found = batches.setdefault(case.size, [])
        if str(case.batch_size) not in found:
            found.append(str(case.batch_size))
    return {size: f'{size}\nbatch {", ".join(found)}' for size, found in batches.items()}


def _log_panel(panel: Axes, ticks: Dict[int, str], ylabel: str) -> None:
    panel.set_xscale('log')
    panel.set_xticks(list(ticks), ticks.values(), fontsize=9)
    panel.minorticks_off()
    if any(value > 0 for line in panel.lines for value in line.get_ydata()):  # nothing may have run
        panel.set_yscale('log')
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
    panel.set_xlabel('image size, pixels')
    panel.set_ylabel(ylabel)
    panel.grid(alpha=0.3)


def plot_training(histories: Dict[str, Sequence[Epoch]], path: Path) -> None:
    """Training loss and held-out accuracy of every model after each epoch."""
    figure = Figure(figsize=(9, 3.8), layout='constrained')
    panels = figure.subplots(1, 2)
    for i, (model, history) in enumerate(histories.items()):
        epochs = [record.epoch for record in history]
        style = dict(marker=MARKERS[i % len(MARKERS)], color=f'C{i % 10}', label=model)
        panels[0].plot(epochs, [record.loss for record in history], **style)
        panels[1].plot(epochs, [100 * record.accuracy for record in history], **style)
    panels[0].set_yscale('log')
    for panel, ylabel in zip(panels, ('training loss', 'held-out accuracy, %')):
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel('epoch')
        panel.set_ylabel(ylabel)
        panel.grid(alpha=0.3)
        panel.legend()
    save_figure(figure, path)


def plot_run(history: Sequence[Dict[str, float]], path: Path) -> None:
    """Losses and accuracies of a training run after each epoch; what a run has not measured is left out."""
    panels_of = {
        'loss': {'train_loss': 'training', 'val_loss': 'validation'},
        'validation accuracy, %': {'val_top1': 'top-1', 'val_top5': 'top-5', 'ema_top1': 'top-1, average of weights'},
    }
    figure = Figure(figsize=(9, 3.8), layout='constrained')
    for panel, (ylabel, curves) in zip(figure.subplots(1, 2), panels_of.items()):
        for key, label in curves.items():
            rows = [row for row in history if key in row]
            if rows:
                panel.plot([row['epoch'] for row in rows], [row[key] for row in rows], marker='.', label=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel('epoch')
        panel.set_ylabel(ylabel)
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend()
    save_figure(figure, path)


def plot_accuracies(curves: Dict[str, Dict[str, List[List[float]]]], path: Path) -> None:
    """Validation accuracy against epoch: the mean over the runs of a model, and a band from the worst to the best.

    Args:
        curves: Accuracies after each epoch of each run, by task and model.
        path: Of the picture.
    """
    figure = Figure(figsize=(5.5 * len(curves), 4.6), layout='constrained')
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (task, models) in zip(panels, curves.items()):
        for i, (model, runs) in enumerate(models.items()):
            longest = max(map(len, runs))
            values = [[run[epoch] for run in runs if epoch < len(run)] for epoch in range(longest)]
            epochs = range(1, longest + 1)
            means = [sum(found) / len(found) for found in values]
            style = dict(marker=MARKERS[i % len(MARKERS)], markevery=max(longest // 8, 1), color=f'C{i % 10}')
            panel.plot(epochs, means, label=model, markersize=4, **style)
            panel.fill_between(epochs, list(map(min, values)), list(map(max, values)), color=f'C{i % 10}', alpha=0.2)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_title(task, fontsize=11)
        panel.set_xlabel('epoch')
        panel.set_ylabel('validation accuracy, %')
        panel.grid(alpha=0.3)
        panel.legend()
    save_figure(figure, path)
