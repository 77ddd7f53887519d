"""Compares feature extraction by timm models at rising resolutions: speed and memory.

Every model and size runs in a fresh process. Running out of memory or time is a result, not an error.

    python tools/compare_highres.py --sizes 224 448 896
    python tools/compare_highres.py --models vim_t deit_tiny_patch16_224:plain --dtype bfloat16 --batch-size 64
"""

import argparse
import csv
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Iterable, List, Optional, Tuple

from measure import Case, Result, device_name, pick_device
from plots import plot_comparison
from rich.console import Console
from rich.progress import track
from rich.table import Table

MODELS = (
    'vmamba_t',
    'vim_t',
    'deit_tiny_patch16_224:plain',
    'deit_tiny_patch16_224:fused',
    'swin_tiny_patch4_window7_224',
)
SIZES = (224, 448, 672, 896)

Measurement = Tuple[Case, Result]


def run_case(case: Case, timeout: float) -> Result:
    """Measures in a fresh interpreter; a child that dies or takes more than `timeout` seconds is a result too."""
    command = [sys.executable, str(Path(__file__).with_name('measure.py')), json.dumps(asdict(case))]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return Result('timeout', message=f'took more than {timeout:g} s')
    if child.returncode == 0:
        return Result(**json.loads(child.stdout.splitlines()[-1]))
    if child.returncode == -signal.SIGKILL:
        return Result('OOM', message='killed, as the system does to a process that takes too much memory')
    lines = child.stderr.strip().splitlines() or [f'exit status {child.returncode}']
    return Result('failed', message=lines[-1])


def compare(cases: List[Case], timeout: float, console: Console) -> List[Measurement]:
    """Measures every case, one after another, under a progress bar."""
    progress = track(cases, description='Comparing', console=console)
    return [(case, run_case(case, timeout)) for case in progress]


def write_csv(measurements: Iterable[Measurement], path: Path) -> None:
    """One row a case, with everything needed to tell it from a run elsewhere."""
    rows = [{**asdict(case), **asdict(result)} for case, result in measurements]
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_table(measurements: Iterable[Measurement], title: str) -> Table:
    table = Table('model', title=title)
    for column in ('size', 'images/s', 'ms/image', 'peak MiB'):
        table.add_column(column, justify='right')
    last = None
    for case, result in measurements:
        if last not in (None, case.model):
            table.add_section()
        last = case.model
        table.add_row(case.model, str(case.size), *_cells(result))
    return table


def _cells(result: Result) -> Tuple[str, str, str]:
    if result.status != 'ok':
        return result.status, '-', '-'
    return f'{result.images_per_second:.2f}', f'{result.ms_per_image:.1f}', f'{result.peak_mib:.0f}'


def write_report(measurements: List[Measurement], output: Path, console: Console, device: str) -> None:
    """Prints the table and writes highres.csv and highres.png into the folder `output`."""
    first = measurements[0][0]
    title = f'Feature extraction, batch {first.batch_size}, {first.dtype}\n{device}'
    console.print(make_table(measurements, title))
    for case, result in measurements:
        if result.message:
            console.print(f'{case.model} at {case.size}: {result.status}: {result.message}', markup=False)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(measurements, output / 'highres.csv')
    plot_comparison(measurements, title, output / 'highres.png')
    console.print(f'Wrote {output / "highres.csv"} and {output / "highres.png"}')


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--models', nargs='+', default=MODELS, help='timm names; NAME:plain, NAME:fused for attention')
    parser.add_argument('--sizes', nargs='+', type=int, default=SIZES, help='sides of the square images')
    parser.add_argument('--batch-size', type=int, default=1)
    parser.add_argument('--dtype', default='float32', choices=('float32', 'float16', 'bfloat16'))
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: the GPU if there is one')
    parser.add_argument('--repeats', type=int, default=5, help='forwards of which the median time is taken')
    parser.add_argument('--compile', action='store_true', help='use torch.compile')
    parser.add_argument('--cuda-graph', action='store_true', help='replay a CUDA graph')
    parser.add_argument('--memory-limit', type=int, help='most MiB that a forward may take on a CPU (Linux)')
    parser.add_argument('--timeout', type=float, default=600, help='most seconds for one model and size')
    parser.add_argument('--output', type=Path, default=Path('highres'), help='folder of highres.csv and highres.png')
    args = parser.parse_args(argv)
    args.device = pick_device(args.device)
    if args.cuda_graph and args.device.type != 'cuda':
        parser.error('--cuda-graph needs a GPU')
    return args


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    settings = dict(
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device.type,
        repeats=args.repeats,
        compile=args.compile,
        cuda_graph=args.cuda_graph,
        memory_limit=args.memory_limit,
    )
    cases = [Case(model, size, **settings) for model in args.models for size in args.sizes]
    console = Console()
    write_report(compare(cases, args.timeout, console), args.output, console, device_name(args.device))


if __name__ == '__main__':
    main()
