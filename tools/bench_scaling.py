"""Measures how training with train.py scales with the number of processes: images per second on synthetic images.

vmamba bench scaling --docs docs/benchmarks.md
vmamba bench scaling --device cpu --model vmamba_nano --batch-size 4 --updates 2 --epochs 2 --processes 1 2
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

import pandas as pd
import torch

from vmamba.configs import FOLDER
from vmamba.tools.benchmarks.report import Report, command_of, versions
from vmamba.tools.devices import device_name, pick_device
from vmamba.tools.user_errors import UserError, one_line_errors, positive

from rich.console import Console
from rich.progress import track

TRAIN = Path(__file__).with_name('train.py')
CONFIG = FOLDER / 'classification/synthetic.yaml'
OUTPUTS = ('--docs',)
NOTES = """`train.py` with {model} in {precision}, {batch_size} images per process and step, which are on the device
already; one process runs without torchrun. {how} Medians of {epochs} epochs of {updates} steps in {repeats} run(s) of
each, after one epoch that does not count; the efficiency is the rate over that of one process times their number. The
peak is that of the first process{memory}."""


class Result(NamedTuple):
    """Images per second of all processes together, and the peak of the first one's memory in MiB."""

    processes: int
    rate: float
    peak: float


def measure(counts: Sequence[int], args: argparse.Namespace) -> List[Result]:
    """Runs train.py with every number of processes, up and down in turn, so that a drift meets all alike."""
    runs = [count for repeat in range(args.repeats) for count in (counts if repeat % 2 == 0 else counts[::-1])]
    rows: Dict[int, List[Dict[str, str]]] = {count: [] for count in counts}
    for count in track(runs, f'Training {args.model}'):
        rows[count] += run(count, args)
    return [summarise(count, rows[count]) for count in counts]


def run(count: int, args: argparse.Namespace) -> List[Dict[str, str]]:
    """The epochs of a run, without the first.

    Raises:
        UserError: If it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, 'run')
        # As torchrun would set it, so that one process has no more of the processor than each of several.
        env = {'OMP_NUM_THREADS': '1', **os.environ}
        done = subprocess.run(command(count, args, output), env=env, capture_output=True, text=True)
        if done.returncode:
            reason = next((line for line in done.stderr.splitlines() if 'rror:' in line), done.stderr.strip()[-300:])
            raise UserError(f'training with {count} process(es) failed: {reason}')
        with (output / 'epochs.csv').open() as file:
            return list(csv.DictReader(file))[1:]


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
    switches = {'compile': args.compile, 'shard': args.shard and count > 1}
    values = [str(part) for name, value in options.items() for part in (f'--{name}', value)]
    return [
        sys.executable,
        *launcher,
        str(TRAIN),
        str(CONFIG),
        *values,
        *(f'--{name}' for name in switches if switches[name]),
    ]


def summarise(count: int, rows: Sequence[Dict[str, str]]) -> Result:
    rate = statistics.median(float(row['images_per_second']) for row in rows)
    return Result(count, rate, max(float(row['memory_mib']) for row in rows))


def report_of(results: Sequence[Result], args: argparse.Namespace, command: str) -> Report:
    how = 'Several share the weights by FSDP2.' if args.shard else 'Several average their gradients by DDP.'
    how += ' The model is compiled.' if args.compile else ''
    memory = ", by PyTorch's allocator" if args.device.type == 'cuda' else ', with all that Python takes'
    modes = [mode for mode in ('shard', 'compile') if getattr(args, mode)]
    gpus = f'{args.devices} x ' if args.device.type == 'cuda' else ''
    single = results[0].rate
    rows = [
        {
            'processes': count,
            'images per step': args.batch_size * count,
            'images/s': rate,
            'efficiency': rate / (count * single),
            'peak MiB per process': peak,
        }
        for count, rate, peak in results
    ]
    return Report(
        ' '.join(['bench_scaling', *modes]),
        f'Scaling of training{" with --" if modes else ""}{" --".join(modes)}',
        {'machine': f'{gpus}{device_name(args.device)}', 'versions': versions(), 'command': command},
        [pd.DataFrame(rows)],
        textwrap.fill(NOTES.format(**vars(args), how=how, memory=memory), width=120, break_on_hyphens=False),
    )


def process_counts(wanted: Optional[Sequence[int]], args: argparse.Namespace) -> List[int]:
    """The numbers of processes to measure, from 1 on, which the others are compared with.

    Raises:
        UserError: If there are fewer GPUs.
    """
    if not wanted:
        return [count for count in (1, 2, 4, 8) if count <= args.devices]
    counts = sorted({1, *wanted})
    if args.device.type == 'cuda' and counts[-1] > args.devices:
        raise UserError(f'{counts[-1]} processes need as many GPUs, and there are {args.devices}')
    return counts


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='vmamba_t', help='any timm model')
    parser.add_argument(
        '--processes', nargs='+', type=positive, help='default: 1, 2, 4 and 8, as far as there are GPUs'
    )
    parser.add_argument('--batch-size', type=positive, default=128, help='images per process')
    parser.add_argument('--precision', choices=('fp32', 'bf16', 'fp16'), default='bf16')
    parser.add_argument('--shard', action='store_true', help='share the weights among the processes (FSDP2)')
    parser.add_argument('--compile', action='store_true', help='compile the model')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: the GPU if there is one')
    parser.add_argument('--updates', type=positive, default=50, help='steps per epoch')
    parser.add_argument('--epochs', type=positive, default=5, help='epochs of which the median is taken')
    parser.add_argument('--repeats', type=positive, default=1, help='runs with every number of processes')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the table')
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    args.devices = torch.cuda.device_count() if args.device.type == 'cuda' else 1
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with one_line_errors('bench_scaling.py'):
        results = measure(process_counts(args.processes, args), args)
        report = report_of(results, args, command_of('bench scaling', argv, OUTPUTS))
        report.print(Console())
        if args.docs:
            report.write_section(args.docs)


if __name__ == '__main__':
    main()
