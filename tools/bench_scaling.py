"""Measures how training with train.py scales with the number of processes: images per second on synthetic images.

vmamba bench scaling --docs docs/benchmarks.md
vmamba bench scaling --device cpu --model vmamba_nano --batch-size 4 --updates 2 --epochs 2 --processes 1 2
"""

import argparse
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import List, Optional, Sequence

import pandas as pd
import torch

from vmamba.configs import FOLDER
from vmamba.tools.benchmarks.report import Report, facts_of
from vmamba.tools.benchmarks.trainings import SCRIPT, epochs_of, last_error
from vmamba.tools.devices import add_device_option
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import Parser, UserError, one_line_errors, positive

from rich.progress import track

CONFIG = FOLDER / 'classification/synthetic.yaml'
NOTES = """`train.py` with {model} in {precision}, {batch_size} images per process and step, which are on the device
already; one process runs without torchrun. {how} Medians of {epochs} epochs of {updates} steps in {repeats} run(s) of
each, after one epoch that does not count; the efficiency is the rate over that of one process times their number. The
peak is that of the first process{memory}."""


def measure(counts: Sequence[int], args: argparse.Namespace) -> pd.DataFrame:
    """The epochs of runs with every number of processes, up and down in turn, so that a drift meets all alike."""
    runs = [count for repeat in range(args.repeats) for count in (counts if repeat % 2 == 0 else counts[::-1])]
    return pd.concat([run(count, args).assign(processes=count) for count in track(runs, f'Training {args.model}')])


def run(count: int, args: argparse.Namespace) -> pd.DataFrame:
    """The epochs of a run, without the first.

    Raises:
        UserError: If it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        # As torchrun would set it, so that one process has no more of the processor than each of several.
        env = {'OMP_NUM_THREADS': '1', **os.environ}
        done = subprocess.run(command(count, args, Path(folder)), env=env, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f'training with {count} process(es) failed: {last_error(done.stderr)}')
        return epochs_of(Path(folder)).iloc[1:]


def command(count: int, args: argparse.Namespace, output: Path) -> List[str]:
    """The command line of train.py for so many processes."""
    launcher = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(count)] if count > 1 else []
    options = {
        'model': args.model,
        'batch-size': args.batch_size,
        'synthetic-images': args.batch_size * args.updates * count,
        'epochs': 1 + args.epochs,
        'log-every': args.updates,
        'precision': args.precision,
        'device': args.device.type,
        'output': output,
    }
    switches = ['--compile'] * args.compile + ['--shard'] * (args.shard and count > 1)
    values = [f'--{name}={value}' for name, value in options.items()]
    return [sys.executable, *launcher, str(SCRIPT), str(CONFIG), *values, *switches]


def report_of(epochs: pd.DataFrame, args: argparse.Namespace, argv: Sequence[str]) -> Report:
    how = 'Several share the weights by FSDP2.' if args.shard else 'Several average their gradients by DDP.'
    how += ' The model is compiled.' if args.compile else ''
    memory = ", by PyTorch's allocator" if args.device.type == 'cuda' else ', with all that Python takes'
    modes = [mode for mode in ('shard', 'compile') if getattr(args, mode)]
    facts = facts_of(args.device, 'bench scaling', argv)
    if args.device.type == 'cuda':
        facts['machine'] = f'{torch.cuda.device_count()} x {facts["machine"]}'
    runs = epochs.groupby('processes')
    table = pd.DataFrame({'images/s': runs.images_per_second.median(), 'peak MiB per process': runs.memory_mib.max()})
    table.insert(0, 'images per step', args.batch_size * table.index)
    table.insert(2, 'efficiency', table['images/s'] / (table.index * table['images/s'][1]))
    return Report(
        ' '.join(['bench_scaling', *modes]),
        f'Scaling of training{" with --" if modes else ""}{" --".join(modes)}',
        facts,
        [table.reset_index()],
        textwrap.fill(NOTES.format(**vars(args), how=how, memory=memory), width=120, break_on_hyphens=False),
    )


def process_counts(args: argparse.Namespace) -> List[int]:
    """The numbers of processes to measure, from 1 on, which the others are compared with.

    Raises:
        UserError: If there are fewer GPUs.
    """
    on_gpus = args.device.type == 'cuda'
    gpus = torch.cuda.device_count() if on_gpus else 1
    counts = sorted({1, *args.processes}) if args.processes else [count for count in (1, 2, 4, 8) if count <= gpus]
    if on_gpus and counts[-1] > gpus:
        raise UserError(f'{counts[-1]} processes need as many GPUs, and there are {gpus}')
    return counts


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('--model', default='vmamba_t', help='any timm model')
    parser.add_argument(
        '--processes', nargs='+', type=positive, help='default: 1, 2, 4 and 8, as far as there are GPUs'
    )
    parser.add_argument('--batch-size', type=positive, default=128, help='images per process')
    parser.add_argument('--precision', choices=('fp32', 'bf16', 'fp16'), default='bf16')
    parser.add_argument('--shard', action='store_true', help='share the weights among the processes (FSDP2)')
    parser.add_argument('--compile', action='store_true', help='compile the model')
    add_device_option(parser)
    parser.add_argument('--updates', type=positive, default=50, help='steps per epoch')
    parser.add_argument('--epochs', type=positive, default=5, help='epochs of which the median is taken')
    parser.add_argument('--repeats', type=positive, default=1, help='runs with every number of processes')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the table')
    return parser.parse_args(argv)


@one_line_errors('bench_scaling.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    epochs = measure(process_counts(args), args)
    report_of(epochs, args, argv).publish(open_console(), args.docs)


if __name__ == '__main__':
    main()
