"""Trains vmamba_nano and vim_nano on real digits from scratch, then compares models at high resolution.

Writes training.csv, training.png, highres.csv and highres.png. Exits with an error if a model stays below 97 %.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import timm
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from vmamba.configs import FOLDER
from vmamba.tools.benchmarks.highres_report import print_report, record, write_picture
from vmamba.tools.benchmarks.measure import Case
from vmamba.tools.compare_highres import MODELS, compare
from vmamba.tools.devices import pick_device
from vmamba.tools.figures.plots import plot_training
from vmamba.tools.images.digits import NUM_CLASSES, Digits, Epoch, load_digits, train
from vmamba.tools.images.packaged_data import HELD_OUT, stratified_split
from vmamba.tools.output_files import write_csv
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import read_yaml
from vmamba.tools.user_errors import one_line_errors

import vmamba  # noqa: F401

REQUIRED_ACCURACY = 0.97
SIZES = (224, 448, 672)
WIDTH = 120  # of the tables where there is no terminal


class Recipe(NamedTuple):
    """How a model is trained in a minute or two on two CPU cores."""

    epochs: int
    model_args: Dict[str, Any]


def load_recipes(path: Path = FOLDER / 'classification/demo.yaml') -> Dict[str, Recipe]:
    """Recipe of each model of a YAML file."""
    return {name: Recipe(**recipe) for name, recipe in read_yaml(path).items()}


def train_model(
    name: str, recipe: Recipe, parts: List[Digits], device: torch.device, seed: int, console: Console
) -> List[Epoch]:
    """Trains one model from scratch under a progress bar.

    Args:
        name: Registered name.
        recipe: How to train.
        parts: Training and held-out digits, on the device.
        device: Where to train.
        seed: Of the weights, the order and the augmentation.
        console: Where to show progress.
    """
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=NUM_CLASSES, in_chans=1, **recipe.model_args).to(device)
    columns = TextColumn('{task.description}'), BarColumn(), TextColumn('{task.fields[status]}'), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(f'Training {name}', total=None, status='')

        def report(step: int, steps: int, loss: float, accuracy: float) -> None:
            status = f'step {step}/{steps}, loss {loss:.3f}, accuracy {accuracy:.1%}'
            progress.update(task, completed=step, total=steps, status=status)

        return train(model, *parts, epochs=recipe.epochs, seed=seed, report=report)


def train_all(args: argparse.Namespace, console: Console) -> Dict[str, List[Epoch]]:
    """Trains every model of the recipes on the same split, prints a table, writes training.csv and training.png."""
    digits = load_digits()
    train_indices, test_indices = stratified_split(digits.labels, HELD_OUT, args.seed)
    parts = [digits.take(indices).to(args.device) for indices in (train_indices, test_indices)]
    console.print(f'{len(train_indices)} real digits to learn from, {len(test_indices)} held out, {args.device.type}')
    histories = {}
    for name, recipe in load_recipes().items():
        recipe = recipe._replace(epochs=args.epochs or recipe.epochs)
        histories[name] = train_model(name, recipe, parts, args.device, args.seed, console)
    write_training(histories, args.output)
    table = Table('model', 'epochs', 'seconds', 'held-out accuracy', title='Digits, trained from scratch')
    for name, history in histories.items():
        seconds = sum(record.seconds for record in history)
        table.add_row(name, str(len(history)), f'{seconds:.0f}', f'{history[-1].accuracy:.1%}')
    console.print(table)
    return histories


def write_training(histories: Dict[str, List[Epoch]], output: Path) -> None:
    rows = [[name, *epoch] for name, history in histories.items() for epoch in history]
    write_csv(output / 'training.csv', [['model', *Epoch._fields], *rows])
    plot_training(histories, output / 'training.png')


def compare_models(args: argparse.Namespace, console: Console) -> None:
    """Compares models at rising resolutions, prints a table, writes highres.csv and highres.png."""
    cases = [Case(model, size, device=args.device.type, repeats=2) for model in MODELS for size in args.sizes]
    command = f'python tools/demo.py --sizes {" ".join(map(str, args.sizes))}'
    measurements = record(compare(cases, 300, console), args.output / 'highres.csv', command)
    print_report(measurements, console)
    write_picture(measurements, args.output / 'highres.png')


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, default=Path('demo'), help='folder of the results')
    parser.add_argument('--epochs', type=int, help="default: each model's own")
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: the GPU if there is one')
    parser.add_argument('--sizes', nargs='+', type=int, default=SIZES, help='image sizes of the comparison')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--skip-training', action='store_true')
    parser.add_argument('--skip-comparison', action='store_true')
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    return args


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    with one_line_errors('demo.py'):
        run(args)


def run(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    console = open_console(WIDTH)
    start = time.perf_counter()
    histories = {} if args.skip_training else train_all(args, console)
    if not args.skip_comparison:
        compare_models(args, console)
    console.print(f'Done in {time.perf_counter() - start:.0f} s; results are in {args.output}/')
    low = [f'{name} {h[-1].accuracy:.1%}' for name, h in histories.items() if h[-1].accuracy < REQUIRED_ACCURACY]
    if low:
        sys.exit(f'held-out accuracy below {REQUIRED_ACCURACY:.0%}: {", ".join(low)}')


if __name__ == '__main__':
    main()
