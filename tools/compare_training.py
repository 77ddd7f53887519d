"""Trains models from scratch on packaged images, all by one recipe and with several seeds, and compares accuracies.

A run that fails is a result, not an error; an interrupt reports what has been done, and --resume trains what is
missing. Options that are not listed here go to train.py.

    vmamba compare training --device cuda --jobs 15 --docs docs/benchmarks.md
    vmamba compare training --models vmamba_nano vit resnet18 --tasks clutter --seeds 0 1 --epochs 10
"""

import argparse
import dataclasses
import sys
from itertools import chain, product
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import timm

from vmamba.configs import FOLDER
from vmamba.tools import train
from vmamba.tools.benchmarks.run_queue import Result, Run, keep, kept, train_all
from vmamba.tools.benchmarks.sections import command_of
from vmamba.tools.benchmarks.training_report import (
    NAME,
    Setting,
    cells_of,
    ended,
    ordered,
    print_report,
    record,
    write_docs,
    write_picture,
)
from vmamba.tools.devices import device_name, pick_device
from vmamba.tools.images.packaged_data import DATASETS
from vmamba.tools.output_files import lock_folder
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import FIELDS, Config, load_config, option_of
from vmamba.tools.user_errors import UserError, nearest, one_line_errors, positive

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

RECIPE = FOLDER / 'classification' / 'compare.yaml'
OWN_KEYS = ('model', 'model_args', 'data', 'seed')  # of the configuration, which the comparison sets
OUTPUTS = ('--output', '--docs')
WIDTH = 120  # of the tables where there is no terminal


class Peer(NamedTuple):
    """A model of timm and its arguments."""

    name: str
    args: Dict[str, Any]


# Of about the size of ours, without looking at accuracies: Swin and ConvNeXt have VMamba-nano's stages, strides and
# channels, with as many blocks as make its parameters (Swin's in pairs, which shift windows); the ViT has Vim-nano's
# parameters and, by patches as large as Vim-nano's stride, about its number of tokens.
MODELS = {
    'vmamba_nano': Peer('vmamba_nano', {}),
    'vim_nano': Peer('vim_nano', {}),
    'vit': Peer('deit_tiny_patch16_224', dict(patch_size=4, embed_dim=128, depth=5, num_heads=4)),
    'swin': Peer(
        'swin_tiny_patch4_window7_224',
        dict(window_size=4, embed_dim=32, depths=(2, 2, 4, 1), num_heads=(1, 2, 4, 8)),
    ),
    'convnext': Peer('convnext_atto', dict(depths=(2, 2, 3, 2), dims=(32, 64, 128, 256))),
}


def runs_of(args: argparse.Namespace) -> List[Run]:
    """All runs, the first seed of each model and task first, so that an interrupt leaves something of each."""
    for model in args.models:
        if model not in MODELS and not timm.is_model(model):
            raise UserError(f'there is no model {model!r}{nearest(model, {*MODELS, *timm.list_models()})}')
    for task in args.tasks:
        if task not in DATASETS:
            raise UserError(f'there is no task {task!r}; there are {", ".join(DATASETS)}')
    for name in ('models', 'tasks', 'seeds'):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise UserError(f'--{name} names something twice')
    return [
        Run(task, model, seed, *MODELS.get(model, Peer(model, {})))
        for seed, task, model in product(args.seeds, args.tasks, args.models)
    ]


def shared_config(extra: Sequence[str]) -> Config:
    """The recipe with the options for train.py.

    Raises:
        UserError: If one of them is wrong, or is what the comparison itself sets.
    """
    path, _, values = train.parse_args([str(RECIPE), *extra])
    own = [key for key in OWN_KEYS if key in values]
    if path != RECIPE or own:
        what = option_of(own[0] if own else 'config')
        raise UserError(f'{what} cannot be given to the runs; --models, --tasks and --seeds say what is trained')
    return load_config(RECIPE, values)


def earlier_results(args: argparse.Namespace, runs: Sequence[Run], settings: Dict[str, Any]) -> List[Result]:
    """Results of an interrupted comparison that is resumed.

    Raises:
        UserError: If such runs exist and --resume is not given, or their settings differ.
    """
    if args.resume:
        return kept(runs, settings, args.output)
    if any((args.output / run.name).exists() for run in runs):
        raise UserError(f'{args.output} holds such runs already; give --resume, or choose another --output')
    return []


def compare(
    runs: Sequence[Run],
    earlier: Sequence[Result],
    args: argparse.Namespace,
    options: Sequence[str],
    settings: Dict[str, Any],
    console: Console,
) -> Iterator[Result]:
    """Trains what is missing of the runs, and prints a line for each, under a progress bar."""
    finished = [result.run for result in earlier]
    missing = [run for run in runs if run not in finished]
    columns = TextColumn('Training'), BarColumn(), TextColumn('{task.fields[status]}')
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task('', total=len(missing) * settings['epochs'], status='')
        done = 0

        def tell(going: int, epochs_done: int) -> None:
            progress.update(bar, completed=epochs_done, status=f'{done} of {len(runs)} runs done, {going} running')

        for result in chain(earlier, train_all(missing, options, args.output, args.jobs, args.timeout, tell)):
            done += 1
            if result.status == 'ok' and result.run in missing:
                keep(result, settings, args.output)
            console.print('  '.join([*cells_of(result), result.message]), markup=False, highlight=False)
            yield result


def parse_args(argv: Optional[Sequence[str]] = None) -> Tuple[argparse.Namespace, List[str]]:
    """The options, and those for train.py."""
    summary, _, *more = __doc__.splitlines()
    parser = argparse.ArgumentParser(
        description=summary,
        epilog='\n'.join(more),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        '--models', nargs='+', default=list(MODELS), help=f'{", ".join(MODELS)} (all by default), or any of timm'
    )
    parser.add_argument(
        '--tasks', nargs='+', default=['mnist5k', 'clutter'], help=f'packaged images: {", ".join(DATASETS)}'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--jobs', type=positive, default=1, help='runs at once')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: the GPU if there is one')
    parser.add_argument('--timeout', type=float, default=3600, help='most seconds for a run')
    parser.add_argument(
        '--output', type=Path, default=Path('runs/compare'), help='folder of the CSV file, the picture and the runs'
    )
    parser.add_argument('--resume', action='store_true', help='keep the runs in --output that came to their end')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the tables and the picture')
    args, extra = parser.parse_known_args(argv)
    keys = {*map(option_of, FIELDS), *(option_of(f'no_{key}') for key, field in FIELDS.items() if field.type is bool)}
    choices = {*parser._option_string_actions, *keys} - {*map(option_of, OWN_KEYS)}
    for name in (text.partition('=')[0] for text in extra):
        if name.startswith('--') and name not in keys:
            parser.error(f'unknown option {name!r}{nearest(name, choices)}')
    return args, extra


def run(argv: Sequence[str]) -> None:
    args, extra = parse_args(argv)
    config, runs = shared_config(extra), runs_of(args)
    with lock_folder(args.output):
        train_and_report(args, extra, config, runs, command_of('compare training', argv, OUTPUTS))


def train_and_report(
    args: argparse.Namespace, extra: Sequence[str], config: Config, runs: Sequence[Run], command: str
) -> None:
    """Trains what is missing of the runs, and writes the table, the picture and the section of the page."""
    settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in OWN_KEYS}
    earlier = earlier_results(args, runs, settings)
    device = pick_device(args.device)
    shared = (getattr(config, key) for key in ('epochs', 'batch_size', 'img_size', 'precision'))
    setting = Setting(device_name(device), command, len(runs), args.jobs, *shared)
    console = open_console(WIDTH)
    table, picture = args.output / f'{NAME}.csv', args.output / f'{NAME}.png'
    options = [str(RECIPE), *extra, '--device', device.type]
    results = record(compare(runs, earlier, args, options, settings, console), table, setting)
    if ended(results) < len(runs):
        console.print(f'Interrupted: {ended(results)} of {len(runs)} runs came to an end')
    if not results:
        return
    results = ordered(results, args.models, args.tasks)
    print_report(results, setting, console)
    write_picture(results, picture)
    console.print(f'Wrote {table} and {picture}')
    if args.docs:
        write_docs(results, setting, args.docs)
        console.print(f'Wrote its section of {args.docs}, and its picture beside it')


def main(argv: Optional[Sequence[str]] = None) -> None:
    with one_line_errors('compare_training.py'):
        run(sys.argv[1:] if argv is None else list(argv))


if __name__ == '__main__':
    main()
