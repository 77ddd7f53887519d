"""Compares vmamba_t and vim_t with Swin-T and DeiT-T on a CPU: medians over alternating repeats, and their ratios.

vmamba bench cpu --output bench_cpu.csv
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import timm
import torch
from torch import Tensor, nn

import vmamba  # noqa: F401
from vmamba.tools.devices import device_name
from vmamba.tools.output_files import write_csv
from vmamba.tools.user_errors import one_line_errors

from rich.console import Console
from rich.progress import track
from rich.table import Table

SWIN, DEIT = 'swin_tiny_patch4_window7_224', 'deit_tiny_patch16_224'
SIZE = 224
INFERENCE, TRAINING = 'inference, batch 1', 'forward + backward, batch 2'

Medians = Dict[str, Dict[str, float]]


class Ratio(NamedTuple):
    """Time of `model` over time of `baseline`, and the most it should be."""

    work: str
    model: str
    baseline: str
    target: float


RATIOS = (
    Ratio(INFERENCE, 'vmamba_t', SWIN, 1.2),
    Ratio(TRAINING, 'vmamba_t', SWIN, 2.0),
    Ratio(INFERENCE, 'vim_t', DEIT, 4.0),
)


def inference(model: nn.Module, x: Tensor) -> None:
    """The forward pass of one image."""
    with torch.inference_mode():
        model(x[:1])


def forward_backward(model: nn.Module, x: Tensor) -> None:
    """The forward and backward passes of a batch, the sum of the logits as loss."""
    model(x).sum().backward()
    model.zero_grad()


def measure(
    models: Dict[str, nn.Module], work: Callable[[nn.Module, Tensor], None], x: Tensor, repeats: int
) -> Dict[str, float]:
    """Median seconds of the work for each model; the models take turns, so that noise hits all alike."""
    times: Dict[str, List[float]] = {name: [] for name in models}
    for repeat in track(range(repeats + 1), description=work.__name__):
        for name, model in models.items():
            start = time.perf_counter()
            work(model, x)
            if repeat:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def bench(repeats: int) -> Medians:
    """Medians in seconds by work and model."""
    models = {name: timm.create_model(name) for name in ('vmamba_t', 'vim_t', SWIN, DEIT)}
    x = torch.randn(2, 3, SIZE, SIZE)
    for model in models.values():
        model.eval()
    medians = {INFERENCE: measure(models, inference, x, repeats)}
    for model in models.values():
        model.train()
    medians[TRAINING] = measure(models, forward_backward, x, repeats)
    return medians


def ratios(medians: Medians) -> Dict[Ratio, float]:
    return {ratio: medians[ratio.work][ratio.model] / medians[ratio.work][ratio.baseline] for ratio in RATIOS}


def print_report(medians: Medians, console: Console, title: str) -> None:
    """The medians, then the ratios beside their targets."""
    table = Table('work', 'model', 'median, ms', title=title)
    for work, by_model in medians.items():
        for name, seconds in by_model.items():
            table.add_row(work, name, f'{1e3 * seconds:.1f}')
        table.add_section()
    console.print(table)
    table = Table('work', 'ratio of medians', 'value', 'target')
    for ratio, value in ratios(medians).items():
        table.add_row(ratio.work, f'{ratio.model} / {ratio.baseline}', f'{value:.2f}', f'<= {ratio.target}')
    console.print(table)


def write_results(medians: Medians, device: str, path: Path) -> None:
    """One row a median (in milliseconds), then one a ratio."""
    about = [device, torch.__version__, torch.get_num_threads(), SIZE]
    rows = [['kind', 'work', 'name', 'value', 'device', 'torch', 'threads', 'size']]
    for work, by_model in medians.items():
        rows += [['median_ms', work, name, 1e3 * seconds, *about] for name, seconds in by_model.items()]
    for ratio, value in ratios(medians).items():
        rows.append(['ratio', ratio.work, f'{ratio.model}/{ratio.baseline}', value, *about])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, rows)


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=9, help='rounds of which the medians are taken')
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--output', type=Path, help='CSV file to write')
    return parser.parse_args(argv)


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = device_name(torch.device('cpu'))
    console = Console()
    medians = bench(args.repeats)
    print_report(
        medians, console, f'{SIZE}x{SIZE}, float32, {args.repeats} rounds\n{device}, torch {torch.__version__}'
    )
    if args.output:
        with one_line_errors('bench_cpu.py'):
            write_results(medians, device, args.output)
        console.print(f'Wrote {args.output}')


if __name__ == '__main__':
    main()
