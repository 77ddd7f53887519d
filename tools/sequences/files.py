"""Generated data sets in files: a folder with an .npz file for each split."""

from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Dict, Iterable

import numpy as np

from rich.progress import track

from .listops import make_listops
from .pathfinder import SETTINGS, draw_sample

SPLITS = 'train', 'validation', 'test'
PATHFINDER = 'pathfinder'
# The published numbers of examples of each split.
COUNTS = {
    'listops': (96_000, 2_000, 2_000),
    **{f'{PATHFINDER}{size}': (160_000, 20_000, 20_000) for size in SETTINGS},
}

Arrays = Dict[str, np.ndarray]


def write_task(folder: Path, task: str, counts: Dict[str, int], seed: int, workers: int) -> None:
    """Writes the examples of a task into a folder; they do not depend on the number of processes."""
    make = make_listops if task == 'listops' else partial(make_pathfinder, int(task.removeprefix(PATHFINDER)), workers)
    arrays, first = make(sum(counts.values()), seed), 0
    for split, count in counts.items():
        np.savez(folder / f'{split}.npz', **{name: array[first : first + count] for name, array in arrays.items()})
        first += count


def make_pathfinder(size: int, workers: int, count: int, seed: int) -> Arrays:
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
