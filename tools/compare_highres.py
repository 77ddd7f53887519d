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
import shlex
import sys
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence

from vmamba.tools.benchmarks.comparison import MODELS, compare, record, report_of, write_picture
from vmamba.tools.benchmarks.highres import Case, split_name
from vmamba.tools.devices import add_device_option
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import Parser, UserError, one_line_errors, positive, positive_float

FAST_MODELS = tuple(model for model in MODELS if not model.endswith(':plain'))
SIZES = {'cpu': (224, 448, 672, 896), 'cuda': (224, 512, 1024, 2048, 4096)}
PRECISIONS = {'fp32': 'float32', 'fp16': 'float16', 'bf16': 'bfloat16'}
GPU_BATCH_PIXELS = 2**24


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


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument('--paper', action='store_true', help="Vim's paper: DeiT-T and Vim-T, 512 to 1248, batch 8")
    preset.add_argument('--latency', action='store_true', help='one image of 224 pixels in a CUDA graph')
    preset.add_argument('--benchmarks', action='store_true', help='all that docs/benchmarks.md shows; needs a GPU')
    parser.add_argument('--models', nargs='+', help='timm names; NAME:plain, NAME:fused for attention')
    parser.add_argument('--sizes', nargs='+', type=positive, help='sides of the square images')
    parser.add_argument(
        '--batch-sizes',
        nargs='+',
        type=positive,
        help='one for each size or one for all; default: 1 on a CPU, on a GPU about as many pixels at every size',
    )
    parser.add_argument(
        '--precision', nargs='+', choices=PRECISIONS, help='the lower ones by autocast; default: bf16 on a GPU'
    )
    earlier = dict(dest='precision', default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument('--dtype', nargs='+', choices=tuple(PRECISIONS.values()), **earlier)
    parser.add_argument('--compile', nargs='+', choices=('off', 'on'), help='use torch.compile')
    parser.add_argument('--cuda-graph', nargs='+', choices=('off', 'on'), help='replay a CUDA graph')
    add_device_option(parser)
    defaults = {field.name: field.default for field in fields(Case)}
    parser.add_argument(
        '--repeats', type=positive, default=defaults['repeats'], help='most forwards of which the median time is taken'
    )
    parser.add_argument(
        '--seconds', type=float, default=defaults['seconds'], help='most seconds for these forwards, if more than 3'
    )
    parser.add_argument('--memory-limit', type=positive, help='most MiB that a forward may take on a CPU (Linux)')
    parser.add_argument('--timeout', type=positive_float, default=600, help='most seconds for one case')
    parser.add_argument('--output', type=Path, default=Path('highres'), help='folder of the CSV file and the picture')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the table and the picture')
    return parser.parse_args(argv)


def cases_of(args: argparse.Namespace) -> List[Case]:
    """What the options ask for, the cases of a model together.

    Raises:
        UserError: If options contradict each other.
    """
    grids = BENCHMARKS if args.benchmarks else (grid_of(args),)
    fixed = (args.models, args.sizes, args.batch_sizes, args.compile, args.cuda_graph)
    if args.benchmarks and any(option is not None for option in fixed):
        raise UserError('--benchmarks sets the models, sizes, batch sizes, --compile and --cuda-graph itself')
    if args.device.type != 'cuda' and any(True in grid.cuda_graph for grid in grids):
        raise UserError('a CUDA graph needs a GPU')
    precisions = args.precision or ('bf16' if args.device.type == 'cuda' else 'fp32',)
    dtypes = [PRECISIONS.get(name, name) for name in precisions]
    settings = {name: getattr(args, name) for name in ('repeats', 'seconds', 'memory_limit')}
    cases = [case for grid in grids for case in grid.cases(dtypes, device=args.device.type, **settings)]
    models = list(dict.fromkeys(case.model for case in cases))
    return sorted(cases, key=lambda case: models.index(case.model))


def grid_of(args: argparse.Namespace) -> Grid:
    """The grid of the options; what they leave open is the preset's or the default."""
    preset = PRESETS.get(preset_of(args), Grid(MODELS, SIZES[args.device.type], ()))
    sizes = args.sizes or preset.sizes
    batch_sizes = args.batch_sizes or preset.batch_sizes
    batch_sizes = batch_sizes or tuple(default_batch_size(size, args.device.type) for size in sizes)
    if len(batch_sizes) not in (1, len(sizes)):
        raise UserError(f'--batch-sizes must be one or as many as the {len(sizes)} sizes, got {len(batch_sizes)}')
    chosen = (args.compile, preset.compile), (args.cuda_graph, preset.cuda_graph)
    switches = ([value == 'on' for value in values] if values else default for values, default in chosen)
    return Grid(args.models or preset.models, sizes, batch_sizes, *switches)


def preset_of(args: argparse.Namespace) -> Optional[str]:
    return next((name for name in PRESETS if getattr(args, name)), None)


@one_line_errors('compare_highres.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    for model in args.models or ():
        split_name(model)
    cases, console, preset = cases_of(args), open_console(), preset_of(args)
    name = f'highres_{preset}' if preset else 'highres'
    command = shlex.join(['vmamba', 'compare', 'highres', *argv])
    table, picture = args.output / f'{name}.csv', args.output / f'{name}.png'
    rows = record(compare(cases, args.timeout, console), table, command)
    if len(rows) < len(cases):
        console.print(f'Interrupted: {len(rows)} of {len(cases)} cases were measured')
    write_picture(rows, picture)
    console.print(f'Wrote {table} and {picture}')
    report_of(rows, name, command, len(cases)).publish(console, args.docs, picture)


if __name__ == '__main__':
    main()
