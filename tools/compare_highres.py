"""Compares feature extraction by timm models at rising resolutions: speed and memory.

Running out of memory or time is a result, not an error; an interrupt reports what was measured. On a GPU one process
measures all cases of a model, on a CPU each case has its own.

    vmamba compare highres --sizes 224 448 896
    vmamba compare highres --models vim_t deit_tiny_patch16_224:plain --sizes 224 1248 --batch-sizes 64 8
    vmamba compare highres --models vmamba_t --precision fp16 bf16 --compile off on --cuda-graph off on
    vmamba compare highres --paper
    vmamba compare highres --latency
    vmamba compare highres --benchmarks --docs docs/benchmarks.md
"""

import argparse
import sys
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import pandas as pd

from vmamba.tools.benchmarks.highres import Case, Result, Worker
from vmamba.tools.benchmarks.report import Report, command_of, number, write_records
from vmamba.tools.devices import pick_device
from vmamba.tools.figures.plots import plot_comparison
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import one_line_errors

from rich.console import Console
from rich.progress import track

MODELS = (
    'vmamba_t',
    'vim_t',
    'deit_tiny_patch16_224:plain',
    'deit_tiny_patch16_224:fused',
    'swin_tiny_patch4_window7_224',
    'convnext_tiny',
)
FAST_MODELS = tuple(model for model in MODELS if not model.endswith(':plain'))
SIZES = {'cpu': (224, 448, 672, 896), 'cuda': (224, 512, 1024, 2048, 4096)}
PRECISIONS = {'fp32': 'float32', 'fp16': 'float16', 'bf16': 'bfloat16'}
GPU_BATCH_PIXELS = 2**24
OUTPUTS = ('--output', '--docs')
WIDTH = 120  # of the table where there is no terminal
TITLES = {
    'highres': 'Feature extraction at rising resolutions',
    'highres_paper': "Feature extraction in the setting of Vim's paper",
    'highres_latency': 'Latency of one image',
}
NOTES = """\
The forward pass of a batch of random images in inference mode, without classifier. Parameters and images are fp32; bf16
and fp16 are those of autocast. Times are medians, on a GPU of CUDA events, of at most {repeats} passes or {seconds:g} s
and at least 3 passes. The peak is what PyTorch's allocator (on a CPU, the process) takes at most during a pass without
CUDA graph, beyond the model and the images. OOM is out of memory. Attention that is "plain" writes its matrix, "fused"
is PyTorch's `scaled_dot_product_attention`. Of a size that is no multiple of their patches, Vim and DeiT see the part
that whole patches cover (736 of 738 pixels)."""
Measurement = Tuple[Case, Result]


class Grid(NamedTuple):
    """Models at sizes, in all combinations of how they run.

    Attributes:
        models: timm names; NAME:plain or NAME:fused for the attention.
        sizes: Sides of the square images.
        batch_sizes: One for each size, or one for all.
        compile: With torch.compile or without.
        cuda_graph: Replayed as a CUDA graph or not.
    """

    models: Sequence[str]
    sizes: Sequence[int]
    batch_sizes: Sequence[int]
    compile: Sequence[bool] = (False,)
    cuda_graph: Sequence[bool] = (False,)

    def cases(self, dtypes: Sequence[str], **settings: Any) -> List[Case]:
        """The cases of one model after those of another, each from the first size to the last."""
        batch_sizes = self.batch_sizes if len(self.batch_sizes) > 1 else self.batch_sizes * len(self.sizes)
        runs = product(self.models, dtypes, self.compile, self.cuda_graph, zip(self.sizes, batch_sizes, strict=True))
        return [
            Case(model, size, batch_size, dtype, compile=compiled, cuda_graph=graph, **settings)
            for model, dtype, compiled, graph, (size, batch_size) in runs
        ]


PAPER = Grid(('vim_t', 'deit_tiny_patch16_224:plain', 'deit_tiny_patch16_224:fused'), (512, 640, 738, 1024, 1248), (8,))
LATENCY = Grid(FAST_MODELS, (224,), (1,), cuda_graph=(True,))
PRESETS = {'paper': PAPER, 'latency': LATENCY}
BENCHMARKS = (
    Grid(MODELS, (224, 1248, 2048, 4096), (128, 8, 4, 1)),
    Grid(FAST_MODELS, (224, 1248, 224), (128, 8, 1), cuda_graph=(True,)),
    Grid(FAST_MODELS, (224, 1248), (128, 8), compile=(True,), cuda_graph=(True,)),
)


def default_batch_size(size: int, device: str) -> int:
    """One image on a CPU; on a GPU the power of two that makes about as many pixels at every size."""
    fitting = GPU_BATCH_PIXELS // size**2
    return 1 if device == 'cpu' or fitting == 0 else 2 ** (fitting.bit_length() - 1)


def compare(cases: Sequence[Case], timeout: float, console: Console) -> Iterator[Measurement]:
    """Measures the cases one after another and prints a line for each, under a progress bar."""
    worker = Worker(timeout)
    measured: List[Measurement] = []
    try:
        for case in track(cases, description='Comparing', console=console):
            if case.device == 'cpu' or (measured and measured[-1][0].model != case.model):
                worker.stop()
            measured.append((case, known_out_of_memory(case, measured) or worker.measure(case)))
            console.print('  '.join(map(number, row_of(*measured[-1]).values())), highlight=False)
            yield measured[-1]
    finally:
        worker.stop()


def known_out_of_memory(case: Case, measured: Sequence[Measurement]) -> Optional[Result]:
    """OOM without a trial, if the same ran out of memory with images no larger and no more pixels in all."""
    for other, result in measured:
        same = replace(other, size=case.size, batch_size=case.batch_size) == case
        smaller = other.size <= case.size and _pixels(other) <= _pixels(case)
        if result.status == 'OOM' and same and smaller:
            return replace(result, message=f'not tried: OOM at {other.size}, batch {other.batch_size}')
    return None


def _pixels(case: Case) -> int:
    return case.batch_size * case.size**2


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    examples = '\n'.join(__doc__.splitlines()[5:])
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=examples, formatter_class=form)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument('--paper', action='store_true', help="Vim's paper: DeiT-T and Vim-T, 512 to 1248, batch 8")
    preset.add_argument('--latency', action='store_true', help='one image of 224 pixels in a CUDA graph')
    preset.add_argument('--benchmarks', action='store_true', help='all that docs/benchmarks.md shows; needs a GPU')
    parser.add_argument('--models', nargs='+', help='timm names; NAME:plain, NAME:fused for attention')
    parser.add_argument('--sizes', nargs='+', type=int, help='sides of the square images')
    parser.add_argument(
        '--batch-sizes',
        nargs='+',
        type=int,
        help='one for each size or one for all; default: 1 on a CPU, on a GPU about as many pixels at every size',
    )
    parser.add_argument(
        '--precision', nargs='+', choices=PRECISIONS, help='the lower ones by autocast; default: bf16 on a GPU'
    )
    earlier = dict(dest='precision', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument('--dtype', nargs='+', choices=tuple(PRECISIONS.values()), **earlier)
    parser.add_argument('--compile', nargs='+', choices=('off', 'on'), help='use torch.compile')
    parser.add_argument('--cuda-graph', nargs='+', choices=('off', 'on'), help='replay a CUDA graph')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: the GPU if there is one')
    defaults = {field.name: field.default for field in fields(Case)}
    parser.add_argument(
        '--repeats', type=int, default=defaults['repeats'], help='most forwards of which the median time is taken'
    )
    parser.add_argument(
        '--seconds', type=float, default=defaults['seconds'], help='most seconds for these forwards, if more than 3'
    )
    parser.add_argument('--memory-limit', type=int, help='most MiB that a forward may take on a CPU (Linux)')
    parser.add_argument('--timeout', type=float, default=600, help='most seconds for one case')
    parser.add_argument('--output', type=Path, default=Path('highres'), help='folder of the CSV file and the picture')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the table and the picture')
    args = parser.parse_args(argv)
    args.device = pick_device(args.device).type
    try:
        args.cases = cases_of(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def cases_of(args: argparse.Namespace) -> List[Case]:
    """What the options ask for, the cases of a model together.

    Raises:
        ValueError: If options contradict each other.
    """
    grids = BENCHMARKS if args.benchmarks else (grid_of(args),)
    fixed = (args.models, args.sizes, args.batch_sizes, args.compile, args.cuda_graph)
    if args.benchmarks and any(option is not None for option in fixed):
        raise ValueError('--benchmarks sets the models, sizes, batch sizes, --compile and --cuda-graph itself')
    if args.device != 'cuda' and any(True in grid.cuda_graph for grid in grids):
        raise ValueError('a CUDA graph needs a GPU')
    precisions = args.precision or ('bf16' if args.device == 'cuda' else 'fp32',)
    dtypes = [PRECISIONS.get(name, name) for name in precisions]
    settings = {name: getattr(args, name) for name in ('device', 'repeats', 'seconds', 'memory_limit')}
    cases = [case for grid in grids for case in grid.cases(dtypes, **settings)]
    models = list(dict.fromkeys(case.model for case in cases))
    return sorted(cases, key=lambda case: models.index(case.model))


def grid_of(args: argparse.Namespace) -> Grid:
    """The grid of the options; what they leave open is the preset's or the default."""
    preset = PRESETS.get(preset_of(args), Grid(MODELS, SIZES[args.device], ()))
    sizes = args.sizes or preset.sizes
    batch_sizes = args.batch_sizes or preset.batch_sizes
    batch_sizes = batch_sizes or tuple(default_batch_size(size, args.device) for size in sizes)
    if len(batch_sizes) not in (1, len(sizes)):
        raise ValueError(f'--batch-sizes must be one or as many as the {len(sizes)} sizes, got {len(batch_sizes)}')
    chosen = (args.compile, preset.compile), (args.cuda_graph, preset.cuda_graph)
    switches = ([value == 'on' for value in values] if values else default for values, default in chosen)
    return Grid(args.models or preset.models, sizes, batch_sizes, *switches)


def preset_of(args: argparse.Namespace) -> Optional[str]:
    return next((name for name in PRESETS if getattr(args, name)), None)


def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    with one_line_errors('compare_highres.py'):
        run(args, argv)


def run(args: argparse.Namespace, argv: Sequence[str]) -> None:
    console = open_console(WIDTH)
    preset = preset_of(args)
    name = f'highres_{preset}' if preset else 'highres'
    command = command_of('compare highres', argv, OUTPUTS)
    table, picture = args.output / f'{name}.csv', args.output / f'{name}.png'
    measurements = record(compare(args.cases, args.timeout, console), table, command)
    if len(measurements) < len(args.cases):
        console.print(f'Interrupted: {len(measurements)} of {len(args.cases)} cases were measured')
    report = report_of(measurements, name, command, len(args.cases))
    report.print(console)
    write_picture(measurements, picture)
    console.print(f'Wrote {table} and {picture}')
    if args.docs:
        if report.picture:
            write_picture(measurements, args.docs.with_name(report.picture))
        report.write_section(args.docs)
        console.print(f'Wrote its section of {args.docs}, and its picture beside it')


def record(measurements: Iterable[Measurement], path: Path, command: str) -> List[Measurement]:
    """Writes the CSV file again after each case; an interrupt ends it with what was measured so far, if anything."""
    recorded, rows = [], []
    try:
        for case, result in measurements:
            rows.append({**asdict(case), **asdict(result), 'command': command})
            write_records(rows, path)
            recorded.append((case, result))
    except KeyboardInterrupt:
        if not recorded:
            raise
    return recorded


def row_of(case: Case, result: Result) -> Dict[str, Any]:
    """A row of the table."""
    return {
        'size': case.size,
        'batch': case.batch_size,
        'run': run_of(case),
        'model': case.model,
        'images/s': result.images_per_second if result.status == 'ok' else result.status,
        'ms/image': result.ms_per_image,
        'peak MiB': result.peak_mib,
    }


def run_of(case: Case) -> str:
    """How a case runs: 'bfloat16, compiled, CUDA graph'."""
    modes = ['compiled'] * case.compile + ['CUDA graph'] * case.cuda_graph
    return ', '.join([case.dtype, *modes])


def report_of(measurements: Sequence[Measurement], name: str, command: str, cases: int) -> Report:
    """Models side by side: sorted by how they run, size and batch."""
    runs = list(dict.fromkeys(run_of(case) for case, _ in measurements))
    key = lambda pair: (runs.index(run_of(pair[0])), pair[0].size, pair[0].batch_size)  # noqa: E731
    first, result = measurements[0]
    facts = {
        'machine': machine_of(measurements),
        'versions': result.versions,
        'command': command,
        'cases measured': f'{len(measurements)} of {cases}',
    }
    messages = [
        f'{case.model} at {case.size}, batch {case.batch_size}, {run_of(case)}: {result.status}: {result.message}'
        for case, result in measurements
        if result.message
    ]
    return Report(
        f'compare_highres {name}',
        TITLES[name],
        facts,
        [pd.DataFrame([row_of(*pair) for pair in sorted(measurements, key=key)])],
        NOTES.format(repeats=first.repeats, seconds=first.seconds),
        messages,
        f'{name}.png' if len({case.size for case, _ in measurements}) > 1 else '',
    )


def machine_of(measurements: Sequence[Measurement]) -> str:
    """Name of the device, as the first process that measured anything gives it."""
    return next((result.device_name for _, result in measurements if result.device_name), measurements[0][0].device)


def write_picture(measurements: Sequence[Measurement], path: Path) -> None:
    """Speed and memory against the size, a line for each model and way to run; only the ways that have most sizes."""
    sizes: Dict[str, set] = {}
    series: Dict[Tuple[str, str], List[Measurement]] = {}
    for case, result in measurements:
        sizes.setdefault(run_of(case), set()).add(case.size)
        series.setdefault((case.model, run_of(case)), []).append((case, result))
    most = max(map(len, sizes.values()))
    runs = [run for run, found in sizes.items() if len(found) == most]
    lines = {(model, run): rows for (model, run), rows in series.items() if run in runs}
    labelled = {model if len(runs) == 1 else f'{model}, {run}': rows for (model, run), rows in lines.items()}
    title = machine_of(measurements) + (f', {runs[0]}' if len(runs) == 1 else '')
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_comparison(labelled, title, path)


if __name__ == '__main__':
    main()
