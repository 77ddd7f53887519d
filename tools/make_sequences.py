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
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import numpy as np

from vmamba.tools.output_files import write_folder
from vmamba.tools.sequences.listops import make_listops
from vmamba.tools.sequences.pathfinder import SETTINGS, draw_sample
from vmamba.tools.sequences.tasks import COUNTS, PATHFINDER, SPLITS
from vmamba.tools.user_errors import Parser, one_line_errors, positive

from rich.progress import track


def write_task(folder: Path, task: str, counts: Dict[str, int], seed: int, workers: int) -> None:
    """Writes the examples of a task into a folder; they do not depend on the number of processes."""
    make = make_listops if task == 'listops' else partial(make_pathfinder, int(task.removeprefix(PATHFINDER)), workers)
    arrays, first = make(sum(counts.values()), seed), 0
    for split, count in counts.items():
        np.savez(folder / f'{split}.npz', **{name: array[first : first + count] for name, array in arrays.items()})
        first += count


def make_pathfinder(size: int, workers: int, count: int, seed: int) -> Dict[str, np.ndarray]:
    """Images row by row, uint8 [count, size * size], with their labels, markers and long curves; see `Sample`."""
    settings = SETTINGS[size]
    arrays = {
        'inputs': np.empty((count, size * size), np.uint8),
        'targets': np.empty(count, np.int64),
        'markers': np.empty((count, 2, 2), np.int16),
        'curves': np.empty((count, 2, settings.dashes, 2), np.int16),
    }
    draw = partial(draw_sample, settings, seed)
    with get_context('spawn').Pool(workers) as pool:
        samples: Iterable[Any] = pool.imap(draw, range(count), chunksize=64) if workers > 1 else map(draw, range(count))
        for index, sample in enumerate(track(samples, f'Drawing {PATHFINDER}{size}', total=count)):
            arrays['inputs'][index] = sample.image.ravel()
            for name, value in (('targets', sample.label), ('markers', sample.markers), ('curves', sample.curves)):
                arrays[name][index] = value
    return arrays


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
