"""Makes the data of a long-range task by its published rules.

    vmamba make-sequences listops
    vmamba make-sequences pathfinder32 --workers 2

The folder gets train.npz, validation.npz and test.npz, with the arrays `inputs` [n, length] of uint8 and `targets` [n];
those of Pathfinder also have the centres of the markers and the points of both curves. sequences.json has the
arguments. ListOps takes a minute, Pathfinder of 32 pixels 20 minutes with two processes. A folder that has this data
already is left as it is.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import List, Optional

from vmamba.tools.output_files import write_folder
from vmamba.tools.sequences.files import COUNTS, SPLITS, write_task
from vmamba.tools.user_errors import Parser, one_line_errors, positive


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument('task', choices=COUNTS)
    parser.add_argument('--output', type=Path, help='folder to make; default: data/TASK')
    for split in SPLITS:
        parser.add_argument(f'--{split}', type=positive, help='examples; default: as many as were published')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--workers', type=positive, default=1, help='processes that draw images')
    args = parser.parse_args(argv)
    args.output = args.output or Path('data', args.task)
    return args


@one_line_errors('make_sequences.py')
def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    counts = {split: getattr(args, split) or count for split, count in zip(SPLITS, COUNTS[args.task])}
    settings = {'task': args.task, **counts, 'seed': args.seed}
    write = partial(write_task, task=args.task, counts=counts, seed=args.seed, workers=args.workers)
    if not write_folder(args.output, 'sequences.json', settings, write):
        return print(f'{args.output} has this data already')
    print(f'Wrote {" + ".join(map(str, counts.values()))} examples of {args.task} to {args.output}')


if __name__ == '__main__':
    main()
