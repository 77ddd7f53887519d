"""The figures of the tools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Dict, List, Sequence, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

if TYPE_CHECKING:  # so that a comparison needs no digits
    from digits import Epoch
    from measure import Case, Result

MARKERS = 'osD^vPX*'


def plot_comparison(measurements: Sequence[Tuple[Case, Result]], title: str, path: Path) -> None:
    """Throughput and peak memory against resolution; a size that did not run is named in the legend."""
    figure = Figure(figsize=(11, 5.2), layout='constrained')
    panels = figure.subplots(1, 2)
    by_model: Dict[str, List[Tuple[Case, Result]]] = {}
    for case, result in measurements:
        by_model.setdefault(case.model, []).append((case, result))
    for i, (model, rows) in enumerate(by_model.items()):
        sizes = [case.size for case, result in rows if result.status == 'ok']
        results = [result for _, result in rows if result.status == 'ok']
        style = dict(marker=MARKERS[i % len(MARKERS)], color=f'C{i % 10}', label=_label(model, rows))
        panels[0].plot(sizes, [result.images_per_second for result in results], **style)
        panels[1].plot(sizes, [result.peak_mib for result in results], **style)
    sizes = sorted({case.size for case, _ in measurements})
    _log_panel(panels[0], sizes, 'images per second')
    _log_panel(panels[1], sizes, 'peak memory of the forward, MiB')
    figure.suptitle(title, fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def _label(model: str, rows: Sequence[Tuple[Case, Result]]) -> str:
    missing = [f'{result.status} at {case.size}' for case, result in rows if result.status != 'ok']
    return f'{model} ({", ".join(missing)})' if missing else model


def _log_panel(panel: Axes, sizes: Sequence[int], ylabel: str) -> None:
    panel.set_xscale('log')
    panel.set_xticks(sizes, [str(size) for size in sizes])
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
    figure.savefig(path, dpi=120)
