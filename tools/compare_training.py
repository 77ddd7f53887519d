"""Trains models from scratch on packaged images, all by one recipe and with several seeds, and compares accuracies.

A run that fails is a result, not an error; an interrupt reports what is done, and --resume trains what is missing.

    vmamba compare training --device cuda --jobs 15 --docs docs/benchmarks.md
    vmamba compare training --models vmamba_nano vit resnet18 --tasks clutter --seeds 0 1 --epochs 10
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import pandas as pd
import timm
import yaml

from vmamba.configs import FOLDER
from vmamba.tools.benchmarks.report import Report, versions
from vmamba.tools.benchmarks.trainings import SCRIPT, epochs_of, last_error
from vmamba.tools.devices import add_device_option, device_name
from vmamba.tools.figures.plots import plot_accuracies
from vmamba.tools.images.packaged_data import DATASETS
from vmamba.tools.output_files import lock_folder, write_csv, write_text
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import FIELDS, Config, add_options, load_config
from vmamba.tools.training.runtime import StopRequest
from vmamba.tools.user_errors import Parser, UserError, changes, nearest, one_line_errors, positive, positive_float

from rich.console import Console
from rich.progress import track

RECIPE = FOLDER / 'classification' / 'compare.yaml'
POLL_SECONDS = 0.2
SETTINGS = 'settings.yaml'  # of all runs, in their folder
RESULT = 'result.json'  # in the folder of a run that came to its end
OWN_KEYS = ('model', 'model_args', 'data', 'seed', 'device', 'output')  # of the configuration, which are set here
COLUMNS = ('task', 'model', 'seed', 'status', 'epochs', 'accuracy', 'minutes')
NOTES = """\
Each model is trained from scratch by `configs/classification/compare.yaml`: {epochs} epochs of AdamW with batches of
{batch_size} and images of {img_size}x{img_size} in {precision}, the same settings for all models and tasks, tuned to
none. A seed decides the weights, the order and the augmentation. Accuracy is in percent, on the validation images after
the last epoch, not after the best one; ± is the standard deviation over the seeds. All runs are listed, also those that
failed. {jobs} ran at once, so that the minutes do not compare the models.
{tasks}

The models of timm are of about the size of ours: `swin` and `convnext` have the four stages of `vmamba_nano`, at
strides 4 to 32 and with 32 to 256 channels, and `vit` has the step between tokens of `vim_nano`, 4 pixels (256 tokens,
and 225 of overlapping patches)."""
TASKS = {
    'mnist5k': '`mnist5k`: 4,000 handwritten digits for training and 1,000 for validation, of 28x28, enlarged.',
    'clutter': '`clutter`: 6,000 digits of random size, place and colour over photographs for training, and 1,500 of\n'
    'other digits over other photographs for validation.',
}
_PARAMETERS = re.compile(r': ([\d.]+) M parameters')

Row = Dict[str, Any]


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


class Run(NamedTuple):
    """What is trained: the task, a model by its name in the tables, and a seed."""

    task: str
    model: str
    seed: int

    @property
    def name(self) -> str:
        return f'{self.task}_{self.model}_{self.seed}'

    @property
    def peer(self) -> Peer:
        return MODELS.get(self.model, Peer(self.model, {}))

    @property
    def built_as(self) -> str:
        args = ', '.join(f'{name}={value}' for name, value in self.peer.args.items())
        return f'`{self.peer.name}({args})`' if args else f'`{self.peer.name}`'


def run_of(row: Row) -> Run:
    return Run(row['task'], row['model'], row['seed'])


def runs_of(args: argparse.Namespace) -> List[Run]:
    """All runs, the first seed of each model and task first, so that an interrupt leaves something of each."""
    for model in args.models:
        if model not in MODELS and not timm.is_model(model):
            raise UserError(f'there is no model {model!r}{nearest(model, {*MODELS, *timm.list_models()})}')
    for name in ('models', 'tasks', 'seeds'):
        if len(set(getattr(args, name))) < len(getattr(args, name)):
            raise UserError(f'--{name} names something twice')
    return [Run(task, model, seed) for seed, task, model in product(args.seeds, args.tasks, args.models)]


def train(run: Run, config: Config, args: argparse.Namespace, stop: StopRequest) -> Optional[Row]:
    """Trains in a process of its own, and returns what came of it, nothing if it was not begun. No weights are kept."""
    if stop.signal:
        return None
    folder, peer = args.output / run.name, run.peer
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    own = dict(model=peer.name, model_args=peer.args, seed=run.seed, data=f'packaged/{run.task}')
    write_text(folder / 'run.yaml', yaml.safe_dump({**vars(config), **own, 'device': args.device.type}))
    start = time.monotonic()
    with (folder / 'log.txt').open('w') as log:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder / 'run.yaml'), '--output', str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={'OMP_NUM_THREADS': '1', **os.environ},  # more threads would compete for the processor
            start_new_session=True,  # so that its loading processes end with it, and Ctrl-C comes here alone
        )
        while process.poll() is None and not stop.signal and time.monotonic() < start + args.timeout:
            time.sleep(POLL_SECONDS)
        code = process.poll()
        with suppress(ProcessLookupError):  # where all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    text, message = (folder / 'log.txt').read_text(errors='replace'), ''
    if code is None:
        status = 'interrupted' if stop.signal else 'timeout'
        message = '' if stop.signal else f'took more than {args.timeout:g} s'
    else:
        status = 'failed' if code else 'ok'
        message = (last_error(text) or f'exit status {code}') if code else ''
    for path in (*folder.glob('*.pt'), *folder.glob('.*.part')):
        path.unlink()
    parameters, accuracies = _PARAMETERS.search(text), epochs_of(folder).val_top1.tolist()
    return dict(
        **run._asdict(),
        parameters_m=float(parameters[1]) if parameters else None,
        status=status,
        epochs=len(accuracies),
        accuracy=float(accuracies[-1]) if status == 'ok' and accuracies else None,
        minutes=round((time.monotonic() - start) / 60, 2),
        message=message,
    )


def earlier_rows(args: argparse.Namespace, config: Config, runs: Sequence[Run]) -> List[Row]:
    """Those of the runs that an interrupted comparison in the same folder has completed, with --resume.

    Raises:
        UserError: If there is one without --resume, or it had other settings.
    """
    settings = {key: value for key, value in vars(config).items() if key not in OWN_KEYS}
    folders, record = [args.output / run.name for run in runs], args.output / SETTINGS
    if not args.resume and any(folder.exists() for folder in folders):
        raise UserError(f'{args.output} holds such runs already; give --resume, or choose another --output')
    if args.resume and record.is_file() and (differences := changes(yaml.safe_load(record.read_text()), settings)):
        raise UserError(f'{args.output} has runs with {differences}; choose another --output')
    write_text(record, yaml.safe_dump(settings))
    return [json.loads((folder / RESULT).read_text()) for folder in folders if (folder / RESULT).is_file()]


def compare(runs: Sequence[Run], rows: List[Row], config: Config, args: argparse.Namespace, console: Console) -> None:
    """Trains what is missing among the rows, and adds a row for each run as it ends; an interrupt ends all runs."""
    done, stop = set(map(run_of, rows)), StopRequest()
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            futures = [pool.submit(train, run, config, args, stop) for run in runs if run not in done]
            for future in track(as_completed(futures), 'Training', total=len(futures), console=console):
                if row := future.result():
                    rows.append(row)
                    write_csv(args.output / 'training.csv', rows)
                    if row['status'] == 'ok':
                        write_text(args.output / run_of(row).name / RESULT, json.dumps(row))
                    shown = [str(row[key]) for key in COLUMNS if row[key] is not None]
                    console.print('  '.join([*shown, row['message']]), markup=False, highlight=False)
        except BaseException:
            stop.signal = signal.SIGTERM  # ends the runs
            raise
    stop.restore()
    rows.sort(key=lambda row: (args.tasks.index(row['task']), args.models.index(row['model']), row['seed']))
    if stop.signal:
        console.print(f'Interrupted: {_done(rows)} of {len(runs)} runs are done')


def _done(rows: Sequence[Row]) -> int:
    return sum(row['status'] != 'interrupted' for row in rows)


def summary(rows: Sequence[Row]) -> pd.DataFrame:
    """A row for each model: parameters, and for each task the mean and the standard deviation of accuracies."""
    frame = pd.DataFrame(rows).astype({'accuracy': float, 'parameters_m': float})
    frame['built as'] = [run_of(row).built_as for row in rows]
    table = frame.pivot_table(
        index=['model', 'built as'], columns='task', values='accuracy', aggfunc=spread, dropna=False, sort=False
    )
    parameters = frame.groupby(['model', 'built as'], sort=False)['parameters_m'].first()
    table.insert(0, 'parameters, M', parameters)
    return table.reset_index()


def spread(accuracies: pd.Series) -> str:
    """Mean and standard deviation of the runs that came to their end, and how many did not."""
    values = accuracies.dropna()
    missing = f' ({len(values)} of {len(accuracies)} runs)' if len(values) < len(accuracies) else ''
    deviation = f' ± {values.std():.2f}' if len(values) > 1 else ''
    return (f'{values.mean():.2f}{deviation}' if len(values) else '-') + missing


def report_of(rows: Sequence[Row], config: Config, args: argparse.Namespace, runs: int, command: str) -> Report:
    tasks = '\n'.join(TASKS[task] for task in args.tasks if task in TASKS)
    facts = {
        'machine': device_name(args.device),
        'versions': versions(),
        'command': command,
        'runs done': f'{_done(rows)} of {runs}',
    }
    return Report(
        'compare_training',
        'Training from scratch',
        facts,
        [summary(rows), pd.DataFrame(rows)[list(COLUMNS)]],
        NOTES.format(**dataclasses.asdict(config), jobs=args.jobs, tasks=tasks),
        [
            f'{row["model"]} on {row["task"]}, seed {row["seed"]}: {row["status"]}: {row["message"]}'
            for row in rows
            if row['message']
        ],
        'training.png',
    )


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__, usage='%(prog)s [--MODELS NAME ...] [--KEY VALUE ...]')
    parser.add_argument(
        '--models', nargs='+', default=list(MODELS), help=f'{", ".join(MODELS)} (all by default), or any of timm'
    )
    parser.add_argument('--tasks', nargs='+', choices=DATASETS, default=['mnist5k', 'clutter'], help='packaged images')
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--jobs', type=positive, default=1, help='runs at once')
    add_device_option(parser)
    parser.add_argument('--timeout', type=positive_float, default=3600, help='most seconds for a run')
    parser.add_argument(
        '--output', type=Path, default=Path('runs/compare'), help='folder of the CSV file, the picture and the runs'
    )
    parser.add_argument('--resume', action='store_true', help='keep the runs in --output that came to their end')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the tables and the picture')
    add_options(parser.add_argument_group('keys of the configuration'), without=OWN_KEYS)
    return parser.parse_args(argv)


@one_line_errors('compare_training.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    overrides = {key: value for key, value in vars(args).items() if key in FIELDS and key not in OWN_KEYS}
    config, runs, console = load_config(RECIPE, overrides), runs_of(args), open_console()
    with lock_folder(args.output):
        rows = earlier_rows(args, config, runs)
        compare(runs, rows, config, args, console)
        if not rows:
            return
        report = report_of(rows, config, args, len(runs), shlex.join(['vmamba', 'compare', 'training', *argv]))
        trained = [run_of(row) for row in rows]
        curves = [epochs_of(args.output / run.name).assign(task=run.task, model=run.model) for run in trained]
        plot_accuracies(pd.concat(curves), args.output / 'training.png')
        console.print(f'Wrote {args.output / "training.csv"} and {args.output / "training.png"}')
        report.publish(console, args.docs, args.output / 'training.png')


if __name__ == '__main__':
    main()
