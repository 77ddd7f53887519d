"""Trains models from scratch on packaged images, all by one recipe and with several seeds, and compares accuracies.

A run that fails is a result, not an error; an interrupt reports what is done, and --resume trains what is missing.
Options that are not listed here are passed to train.py.

    vmamba compare training --device cuda --jobs 15 --docs docs/benchmarks.md
    vmamba compare training --models vmamba_nano vit resnet18 --tasks clutter --seeds 0 1 --epochs 10
"""

import argparse
import csv
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import product
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pandas as pd
import timm

from vmamba.configs import FOLDER
from vmamba.tools import train
from vmamba.tools.benchmarks.report import Report, command_of, versions, write_records
from vmamba.tools.devices import device_name, pick_device
from vmamba.tools.figures.plots import plot_accuracies
from vmamba.tools.images.packaged_data import DATASETS
from vmamba.tools.output_files import lock_folder, write_text
from vmamba.tools.terminal import open_console
from vmamba.tools.training.config import FIELDS, Config, load_config, option_of
from vmamba.tools.training.runtime import StopRequest
from vmamba.tools.user_errors import UserError, changes, nearest, one_line_errors, positive

from rich.console import Console
from rich.progress import track

RECIPE = FOLDER / 'classification' / 'compare.yaml'
SCRIPT = Path(__file__).with_name('train.py')
POLL_SECONDS = 0.2
RESULT = 'result.json'  # in the folder of a run that came to its end
OWN_KEYS = ('model', 'model_args', 'data', 'seed')  # of the configuration, which the comparison sets
OUTPUTS = ('--output', '--docs')
WIDTH = 120  # of the tables where there is no terminal
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
_ERROR = re.compile(r'^\S*train(?:\.py)?: error: ')

Row = Dict[str, Any]


class Run(NamedTuple):
    """What is trained: the task, a model by its name in the tables, a seed, and the timm model with its arguments."""

    task: str
    model: str
    seed: int
    timm_name: str
    model_args: Dict[str, Any]

    @property
    def name(self) -> str:
        return f'{self.task}_{self.model}_{self.seed}'


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


class Queue:
    """Runs of train.py, several at once, each in a process of its own.

    Args:
        options: Arguments of train.py besides those of a run.
        output: Folder of the folders of the runs.
        timeout: Most seconds for a run.
    """

    def __init__(self, options: Sequence[str], output: Path, timeout: float) -> None:
        self.options, self.output, self.timeout = options, output, timeout
        self.stopped = False
        self._processes: List[subprocess.Popen] = []

    def train(self, run: Run) -> Row:
        """Trains, and returns what came of it; its weights are not kept."""
        folder = self.output / run.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        args = '--model', run.timm_name, '--model-args', json.dumps(run.model_args), '--seed', str(run.seed)
        command = [sys.executable, str(SCRIPT), *self.options, *args, '--data', f'packaged/{run.task}']
        start, status, message = time.monotonic(), 'ok', ''
        with (folder / 'log.txt').open('w') as log:
            process = subprocess.Popen(
                [*command, '--output', str(folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={'OMP_NUM_THREADS': '1', **os.environ},  # more threads would compete for the processor
                start_new_session=True,  # so that its loading processes end with it, and Ctrl-C comes here alone
            )
            self._processes.append(process)
            try:
                process.wait(self.timeout if not self.stopped else 0)
            except subprocess.TimeoutExpired:
                status, message = 'timeout', f'took more than {self.timeout:g} s'
            _kill(process)
            self._processes.remove(process)  # its number may become that of another process
        text = (folder / 'log.txt').read_text(errors='replace')
        if self.stopped:
            status = 'interrupted'
        elif status == 'ok' and process.returncode:
            status, message = 'failed', last_error(text) or f'exit status {process.returncode}'
        for path in (*folder.glob('*.pt'), *folder.glob('.*.part')):
            path.unlink()
        parameters, accuracies = _PARAMETERS.search(text), accuracies_in(folder)
        return dict(
            **run._asdict(),
            parameters_m=float(parameters[1]) if parameters else None,
            status=status,
            epochs=len(accuracies),
            accuracy=accuracies[-1] if status == 'ok' and accuracies else None,
            minutes=round((time.monotonic() - start) / 60, 2),
            message=message,
        )

    def stop(self) -> None:
        """Ends the runs in progress."""
        self.stopped = True
        for process in list(self._processes):
            _kill(process)


def _kill(process: subprocess.Popen) -> None:
    """Ends a run and its loading processes."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # all have ended
        pass
    process.wait()


def last_error(log: str) -> str:
    """The message of train.py, or the last line of a traceback."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [_ERROR.sub('', line) for line in lines if _ERROR.match(line)]
    return (errors or lines or [''])[-1]


def accuracies_in(folder: Path) -> List[float]:
    """On the validation images, after each epoch of the run in a folder."""
    path = folder / 'epochs.csv'
    if not path.is_file():
        return []
    with path.open() as file:
        return [float(row['val_top1']) for row in csv.DictReader(file)]


def earlier_results(args: argparse.Namespace, runs: Sequence[Run], settings: Dict[str, Any]) -> List[Row]:
    """Those that an interrupted comparison left, with --resume.

    Raises:
        UserError: If there are such runs without --resume, or they had other settings.
    """
    if not args.resume and any((args.output / run.name).exists() for run in runs):
        raise UserError(f'{args.output} holds such runs already; give --resume, or choose another --output')
    rows = []
    for run in runs:
        path = args.output / run.name / RESULT
        if path.is_file():
            found = json.loads(path.read_text())
            now = json.loads(json.dumps({**settings, **run._asdict()}))
            differences = changes(found['settings'], now)
            if differences:
                raise UserError(f'{path.parent} is of a run with {differences}; choose another --output')
            rows.append(found['row'])
    return rows


def compare(
    runs: Sequence[Run],
    rows: List[Row],
    args: argparse.Namespace,
    options: Sequence[str],
    settings: Dict[str, Any],
    console: Console,
) -> List[Row]:
    """Trains what is missing among the rows, and adds a row for each run as it ends; an interrupt ends all runs."""
    done = {(row['task'], row['model'], row['seed']) for row in rows}
    missing = [run for run in runs if run[:3] not in done]
    queue, stop = Queue(options, args.output, args.timeout), StopRequest()
    with ThreadPoolExecutor(args.jobs) as pool:
        futures = {pool.submit(queue.train, run): run for run in missing}
        try:
            for future in track(ended(futures, stop), 'Training', total=len(futures), console=console):
                run, row = futures[future], future.result()
                rows.append(row)
                write_records(rows, args.output / 'training.csv')
                if row['status'] == 'ok':
                    content = dict(settings={**settings, **run._asdict()}, row=row)
                    write_text(args.output / run.name / RESULT, json.dumps(content))
                shown = [str(row[key]) for key in COLUMNS if row[key] is not None]
                console.print('  '.join([*shown, row['message']]), markup=False, highlight=False)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            queue.stop()
    stop.restore()
    if stop.signal:
        interrupted = [future.result() for future in futures if not future.cancelled()]
        rows += [row for row in interrupted if row not in rows]
        write_records(rows, args.output / 'training.csv')
        count = sum(row['status'] != 'interrupted' for row in rows)
        console.print(f'Interrupted: {count} of {len(runs)} runs are done')
    return sorted(rows, key=lambda row: (args.tasks.index(row['task']), args.models.index(row['model']), row['seed']))


def ended(futures: Iterable[Future], stop: StopRequest) -> Iterator[Future]:
    """The futures as they end, until a signal asks to stop."""
    pending = set(futures)
    while pending and not stop.signal:
        done, pending = wait(pending, POLL_SECONDS, FIRST_COMPLETED)
        yield from done


def summary(rows: Sequence[Row]) -> pd.DataFrame:
    """A row for each model: parameters, and for each task the mean and the standard deviation of accuracies."""
    frame = pd.DataFrame(rows)
    frame['built as'] = [_built_as(row) for row in rows]
    table = frame.pivot_table(
        index=['model', 'built as'], columns='task', values='accuracy', aggfunc=spread, dropna=False, sort=False
    )
    parameters = frame.groupby(['model', 'built as'], sort=False)['parameters_m'].first()
    table.insert(0, 'parameters, M', parameters)
    return table.reset_index()


def _built_as(row: Row) -> str:
    args = ', '.join(f'{name}={value}' for name, value in row['model_args'].items())
    return f'`{row["timm_name"]}({args})`' if args else f'`{row["timm_name"]}`'


def spread(accuracies: pd.Series) -> str:
    """Mean and standard deviation of the runs that came to their end, and how many did not."""
    values = accuracies.dropna()
    missing = f' ({len(values)} of {len(accuracies)} runs)' if len(values) < len(accuracies) else ''
    deviation = f' ± {values.std():.2f}' if len(values) > 1 else ''
    return (f'{values.mean():.2f}{deviation}' if len(values) else '-') + missing


def report_of(rows: Sequence[Row], config: Config, args: argparse.Namespace, runs: int, command: str) -> Report:
    tasks = '\n'.join(TASKS[task] for task in args.tasks if task in TASKS)
    facts = {
        'machine': device_name(pick_device(args.device)),
        'versions': versions(),
        'command': command,
        'runs done': f'{sum(row["status"] != "interrupted" for row in rows)} of {runs}',
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


def write_picture(rows: Sequence[Row], output: Path, path: Path) -> None:
    """Accuracy against epoch, a panel for each task; runs that did not come to their end as far as they came."""
    curves: Dict[str, Dict[str, List[List[float]]]] = {}
    for row in rows:
        found = accuracies_in(output / f'{row["task"]}_{row["model"]}_{row["seed"]}')
        curves.setdefault(row['task'], {}).setdefault(row['model'], []).append(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_accuracies(curves, path)


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
    console, command = open_console(WIDTH), command_of('compare training', argv, OUTPUTS)
    with lock_folder(args.output):
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in OWN_KEYS}
        earlier = earlier_results(args, runs, settings)
        options = [str(RECIPE), *extra, '--device', pick_device(args.device).type]
        rows = compare(runs, earlier, args, options, settings, console)
        if not rows:
            return
        report = report_of(rows, config, args, len(runs), command)
        report.print(console)
        write_picture(rows, args.output, args.output / 'training.png')
        console.print(f'Wrote {args.output / "training.csv"} and {args.output / "training.png"}')
        if args.docs:
            write_picture(rows, args.output, args.docs.with_name('training.png'))
            report.write_section(args.docs)
            console.print(f'Wrote its section of {args.docs}, and its picture beside it')


def main(argv: Optional[Sequence[str]] = None) -> None:
    with one_line_errors('compare_training.py'):
        run(sys.argv[1:] if argv is None else list(argv))


if __name__ == '__main__':
    main()
