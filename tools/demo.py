"""Trains vmamba_nano and vim_nano on real digits from scratch, then compares models at high resolution.

Trains by the repository's own configurations. Writes training.png, highres.csv, highres.png and a folder for each run.
Exits with an error if a model stays below 90 %. At 1248 pixels, the setting of the Vim paper, Vim-T is compared with
DeiT-T with plain attention: see their peak memory.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Dict, Optional, Sequence

import pandas as pd

from vmamba.tools.benchmarks.highres import Case, compare, report_of, write_picture
from vmamba.tools.devices import add_device_option
from vmamba.tools.figures.plots import plot_accuracies
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import load_config
from vmamba.tools.training.run import train
from vmamba.tools.user_errors import Parser, one_line_errors, positive

from rich.console import Console

CONFIGS = 'mnist5k_vmamba_nano', 'mnist5k_vim_nano'
EPOCHS = 3  # minutes on two cores
RECIPE = dict(in_chans=1, lr=3e-3, log=[])
REQUIRED_ACCURACY = 90.0
TASK = '1,000 held-out digits, models trained from scratch on 4,000 others'
MODELS = (
    'vmamba_t',
    'vim_t',
    'deit_tiny_patch16_224:plain',
    'deit_tiny_patch16_224:fused',
    'swin_tiny_patch4_window7_224',
    'convnext_tiny',
)
SIZES = (224, 448, 672)
PAPER = 1248, ('vim_t', 'deit_tiny_patch16_224:plain')
NOTE = (
    'Right: memory of attention that writes its matrix ("plain") grows by the square of the pixels, that of all others '
    'in proportion to them.'
)


def train_all(args: argparse.Namespace, console: Console) -> Dict[str, float]:
    """Trains the models and draws training.png; returns the validation accuracies after the last epoch, in %."""
    found, settings = [], {**RECIPE, 'epochs': args.epochs, 'seed': args.seed, 'device': args.device.type}
    settings['warmup_epochs'] = min(1, args.epochs - 1)
    for name in CONFIGS:
        console.print(f'Training {name}')
        config = load_config(Path(name), {**settings, 'output': str(args.output / name)})
        found.append(pd.DataFrame(train(config, args.resume)).assign(model=config.model))
    frame = pd.concat(found)
    plot_accuracies(frame, TASK, args.output / 'training.png', REQUIRED_ACCURACY)
    return frame.groupby('model', sort=False).val_top1.last().to_dict()


def compare_models(args: argparse.Namespace, console: Console) -> None:
    """Compares models at rising resolutions, prints a table, writes highres.csv and highres.png."""
    device = args.device.type
    cases = [Case(model, size, device=device, repeats=2) for model in MODELS for size in args.sizes]
    if not args.small:
        size, models = PAPER
        cases += [Case(model, size, device=device, repeats=1) for model in models]
    command = f'python tools/demo.py --sizes {" ".join(map(str, args.sizes))}'
    rows = compare(cases, 300, args.output / 'highres.csv', command, console)
    report_of(rows, 'highres', len(cases)).publish(console)
    write_picture(rows, args.output / 'highres.png', NOTE)


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--output', type=Path, default=Path('demo'), help='folder of the results')
    parser.add_argument('--resume', action='store_true', help='continue the training of an interrupted demo')
    parser.add_argument('--epochs', type=positive, default=EPOCHS)
    add_device_option(parser)
    parser.add_argument('--sizes', nargs='+', type=positive, default=SIZES, help='image sizes of the comparison')
    parser.add_argument('--small', action='store_true', help='leave 1248 pixels out')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--skip-training', action='store_true')
    parser.add_argument('--skip-comparison', action='store_true')
    return parser.parse_args(argv)


@one_line_errors('demo.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    console = open_console()
    start = time.perf_counter()
    accuracies = {} if args.skip_training else train_all(args, console)
    if not args.skip_comparison:
        compare_models(args, console)
    console.print(f'Done in {time.perf_counter() - start:.0f} s; results are in {args.output}/')
    low = [f'{model} {found:.1f} %' for model, found in accuracies.items() if found < REQUIRED_ACCURACY]
    if low:
        sys.exit(f'held-out accuracy below {REQUIRED_ACCURACY:.0f} %: {", ".join(low)}')


if __name__ == '__main__':
    main()
