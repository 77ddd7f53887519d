"""Compares feature extraction by timm models at rising resolutions: speed and memory.

Running out of memory or time is a result, not an error; an interrupt reports what was measured. On a GPU one process
measures all cases of a model, on a CPU each case has its own.

    vmamba compare highres --sizes 224 448 896
    vmamba compare highres --models vim_t deit_tiny_patch16_224:plain --sizes 224 1248 --batch-sizes 64 8
    vmamba compare highres --models vmamba_t --precision fp16 bf16 --compile off on --cuda-graph off on
    vmamba compare highres --paper
    vmamba compare highres --latency
    vmamba compare highres --cpu
    vmamba compare highres --benchmarks --docs docs/benchmarks.md
"""

import argparse
import shlex
import sys
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import List, Optional, Sequence

from vmamba.tools.benchmarks.highres import MODELS, Case, compare, report_of, split_name, write_picture
from vmamba.tools.devices import DTYPES, add_device_option
from vmamba.tools.terminal import open_console
from vmamba.tools.user_errors import Parser, UserError, one_line_errors, positive, positive_float

SIZES = {'cpu': (224, 448, 672, 896), 'cuda': (224, 512, 1024, 2048, 4096)}
SWITCH = {'off': False, 'on': True}
GPU_BATCH_PIXELS = 2**24
FAST_MODELS = tuple(model for model in MODELS if not model.endswith(':plain'))
_FAST = f'--models {" ".join(FAST_MODELS)}'
# Options of each grid of cases; those of the command line replace them.
PRESETS = {
    '': [''],
    'paper': [
        '--models vim_t deit_tiny_patch16_224:plain deit_tiny_patch16_224:fused --sizes 512 640 738 1024 1248 '
        '--batch-sizes 8'
    ],
    'latency': [f'{_FAST} --sizes 224 --batch-sizes 1 --cuda-graph on'],
    'cpu': [f'{_FAST} --sizes 224 448 672 --batch-sizes 1 --device cpu'],
    'benchmarks': [
        '--sizes 224 1248 2048 4096 --batch-sizes 128 8 4 1',
        f'{_FAST} --sizes 224 1248 224 --batch-sizes 128 8 1 --cuda-graph on',
        f'{_FAST} --sizes 224 1248 --batch-sizes 128 8 --compile on --cuda-graph on',
    ],
}


def default_batch_size(size: int, device: str) -> int:
    """One image on a CPU; on a GPU the power of two that makes about as many pixels at every size."""
    fitting = GPU_BATCH_PIXELS // size**2
    return 1 if device == 'cpu' or fitting == 0 else 2 ** (fitting.bit_length() - 1)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    helps = {
        'paper': "Vim's paper: DeiT-T and Vim-T, 512 to 1248, batch 8",
        'latency': 'one image of 224 pixels in a CUDA graph',
        'cpu': 'one image of 224 to 672 pixels on the CPU',
        'benchmarks': 'all that docs/benchmarks.md shows; needs a GPU',
    }
    group = parser.add_mutually_exclusive_group()
    for preset, text in helps.items():
        group.add_argument(f'--{preset}', dest='preset', action='store_const', const=preset, default='', help=text)
    models = 'timm names; NAME:plain, NAME:fused for attention'
    parser.add_argument('--models', nargs='+', default=MODELS, help=models)
    parser.add_argument('--sizes', nargs='+', type=positive, help='sides of the square images')
    parser.add_argument(
        '--batch-sizes',
        nargs='+',
        type=positive,
        help='one for each size or one for all; default: 1 on a CPU, on a GPU about as many pixels at every size',
    )
    parser.add_argument(
        '--precision', nargs='+', choices=DTYPES, help='the lower ones by autocast; default: bf16 on a GPU'
    )
    parser.add_argument('--compile', nargs='+', choices=SWITCH, default=['off'], help='use torch.compile')
    parser.add_argument('--cuda-graph', nargs='+', choices=SWITCH, default=['off'], help='replay a CUDA graph')
    add_device_option(parser)
    defaults = {field.name: field.default for field in fields(Case)}
    parser.add_argument(
        '--repeats', type=positive, default=defaults['repeats'], help='most forwards of which the median time is taken'
    )
    parser.add_argument(
        '--seconds', type=float, default=defaults['seconds'], help='most seconds for these forwards, if more than 3'
    )
    parser.add_argument('--timeout', type=positive_float, default=600, help='most seconds for one case')
    parser.add_argument('--output', type=Path, default=Path('highres'), help='folder of the CSV file and the picture')
    parser.add_argument('--docs', type=Path, help='Markdown file in which to write or renew the table and the picture')
    return parser.parse_args(argv)


def cases_of(argv: Sequence[str]) -> List[Case]:
    """What the options ask for, the cases of a model together."""
    grids = PRESETS[parse_args(argv).preset]
    cases = [case for grid in grids for case in grid_of(parse_args([*grid.split(), *argv]))]
    models = list(dict.fromkeys(case.model for case in cases))
    return sorted(cases, key=lambda case: models.index(case.model))


def grid_of(args: argparse.Namespace) -> List[Case]:
    """Models at sizes, in all combinations of how they run.

    Raises:
        UserError: If options contradict each other.
    """
    device = args.device.type
    sizes = args.sizes or SIZES[device]
    batch_sizes = args.batch_sizes or [default_batch_size(size, device) for size in sizes]
    if len(batch_sizes) not in (1, len(sizes)):
        raise UserError(f'--batch-sizes must be one or as many as the {len(sizes)} sizes, got {len(batch_sizes)}')
    if device != 'cuda' and 'on' in args.cuda_graph:
        raise UserError('a CUDA graph needs a GPU')
    precisions = args.precision or ['bf16' if device == 'cuda' else 'fp32']
    pairs = list(zip(sizes, batch_sizes * (len(sizes) // len(batch_sizes))))
    return [
        Case(model, *pair, precision, device, args.repeats, args.seconds, SWITCH[compiled], SWITCH[graph])
        for model, precision, compiled, graph, pair in product(
            args.models, precisions, args.compile, args.cuda_graph, pairs
        )
    ]


@one_line_errors('compare_highres.py')
def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args, cases, console = parse_args(argv), cases_of(argv), open_console()
    name = f'highres_{args.preset}' if args.preset in ('paper', 'latency', 'cpu') else 'highres'
    for model in args.models:
        split_name(model)
    table, picture = args.output / f'{name}.csv', args.output / f'{name}.png'
    rows = compare(cases, args.timeout, table, shlex.join(['vmamba', 'compare', 'highres', *argv]), console)
    if len(rows) < len(cases):
        console.print(f'Interrupted: {len(rows)} of {len(cases)} cases were measured')
    write_picture(rows, picture)
    console.print(f'Wrote {table} and {picture}')
    report_of(rows, name, len(cases)).publish(console, args.docs, picture)


if __name__ == '__main__':
    main()
