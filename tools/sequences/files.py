"""Generated data sets in files: a folder with an .npz file for each split."""

import json
import tempfile
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Dict, Iterable

import numpy as np

from vmamba.tools.output_files import writing

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


def write_task(output: Path, task: str, counts: Dict[str, int], seed: int, workers: int, record: str) -> None:
    """Writes the folder of a task, whole or not at all.

    Args:
        output: The folder, which is not there yet or empty.
        task: Key of COUNTS.
        counts: Examples by split.
        seed: Of the random numbers. The examples do not depend on the number of processes.
        workers: Processes.
        record: Name of the file for these settings.
    """
    make = make_listops if task == 'listops' else partial(make_pathfinder, int(task.removeprefix(PATHFINDER)), workers)
    output.parent.mkdir(parents=True, exist_ok=True)
    with writing(output), tempfile.TemporaryDirectory(dir=output.parent, prefix=f'{output.name}-') as folder:
        partial_output = Path(folder) / output.name
        partial_output.mkdir()
        arrays, first = make(sum(counts.values()), seed), 0
        for split, count in counts.items():
            part = {name: array[first : first + count] for name, array in arrays.items()}
            np.savez(partial_output / f'{split}.npz', **part)
            first += count
        (partial_output / record).write_text(json.dumps(settings_of(task, counts, seed)) + '\n')
        partial_output.rename(output)


def settings_of(task: str, counts: Dict[str, int], seed: int) -> Dict[str, Any]:
    """All that decides every byte."""
    return {'task': task, **counts, 'seed': seed}


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
