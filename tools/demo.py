"""Trains vmamba_nano and vim_nano on real digits from scratch, then compares models at high resolution.

Trains by the repository's own configurations. Writes training.png, highres.csv, highres.png and a folder for each run.
Exits with an error if a model stays below 90 %. At 1248 pixels, the setting of the Vim paper, Vim-T is compared with
DeiT-T with plain attention: see their peak memory.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional

import vmamba  # noqa: F401
from vmamba.tools.benchmarks.highres import Case
from vmamba.tools.compare_highres import MODELS, compare, record, report_of, write_picture
from vmamba.tools.devices import pick_device
from vmamba.tools.figures.plots import plot_accuracies
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import load_config
from vmamba.tools.training.run import train
from vmamba.tools.user_errors import one_line_errors, positive

from rich.console import Console

CONFIGS = {'mnist5k_vmamba_nano': 3, 'mnist5k_vim_nano': 3}  # epochs of each: minutes on two cores
RECIPE = dict(in_chans=1, lr=3e-3, warmup_epochs=1, log=[])
REQUIRED_ACCURACY = 90.0
SIZES = (224, 448, 672)
PAPER = 1248, ('vim_t', 'deit_tiny_patch16_224:plain')
WIDTH = 120  # of the tables where there is no terminal


def train_all(args: argparse.Namespace, console: Console) -> Dict[str, List[float]]:
    """Trains the models and draws training.png; returns the validation accuracies after each epoch, in %."""
    accuracies = {}
    for name, epochs in CONFIGS.items():
        console.print(f'Training {name}')
        overrides = {**RECIPE, 'epochs': args.epochs or epochs, 'seed': args.seed, 'device': args.device.type}
        if overrides['epochs'] == 1:
            overrides['warmup_epochs'] = 0
        config = load_config(Path(name), {**overrides, 'output': str(args.output / name)})
        accuracies[config.model] = [row['val_top1'] for row in train(config, args.resume)]
    plot_accuracies(
        {'5,000 digits': {model: [found] for model, found in accuracies.items()}}, args.output / 'training.png'
    )
    return accuracies


def compare_models(args: argparse.Namespace, console: Console) -> None:
    """Compares models at rising resolutions, prints a table, writes highres.csv and highres.png."""
    device = args.device.type
    cases = [Case(model, size, device=device, repeats=2) for model in MODELS for size in args.sizes]
    if not args.small:
        size, models = PAPER
        cases += [Case(model, size, device=device, repeats=1) for model in models]
    command = f'python tools/demo.py --sizes {" ".join(map(str, args.sizes))}'
    measurements = record(compare(cases, 300, console), args.output / 'highres.csv', command)
    report_of(measurements, 'highres', command, len(cases)).print(console)
    write_picture(measurements, args.output / 'highres.png')


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--output', type=Path, default=Path('demo'), help='folder of the results')
    parser.add_argument('--resume', action='store_true', help='continue the training of an interrupted demo')
    parser.add_argument('--epochs', type=positive, help="default: each model's own")
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: the GPU if there is one')
    parser.add_argument('--sizes', nargs='+', type=positive, default=SIZES, help='image sizes of the comparison')
    parser.add_argument('--small', action='store_true', help='leave 1248 pixels out')
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
    accuracies = {} if args.skip_training else train_all(args, console)
    if not args.skip_comparison:
        compare_models(args, console)
    console.print(f'Done in {time.perf_counter() - start:.0f} s; results are in {args.output}/')
    low = [f'{model} {found[-1]:.1f} %' for model, found in accuracies.items() if found[-1] < REQUIRED_ACCURACY]
    if low:
        sys.exit(f'held-out accuracy below {REQUIRED_ACCURACY:.0f} %: {", ".join(low)}')


if __name__ == '__main__':
    main()
