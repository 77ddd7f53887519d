"""Long-range tasks as data sets: sequences of symbols or numbers, and the classes of their last positions or of all."""

from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vmamba.tools.images.packaged_data import DATASETS as IMAGES
from vmamba.tools.user_errors import UserError, nearest

from . import listops, synthetic
from .pathfinder import SETTINGS

PREFIX = 'sequences/'
SPLITS = 'train', 'validation', 'test'
PATHFINDER = 'pathfinder'
# The published numbers of examples of each split.
COUNTS = {
    'listops': (96_000, 2_000, 2_000),
    **{f'{PATHFINDER}{size}': (160_000, 20_000, 20_000) for size in SETTINGS},
}
Key = Union[int, Tuple[int, int]]


class Task(NamedTuple):
    """What a model has to know of a task.

    Attributes:
        vocab_size: Number of symbols; 0 for real numbers.
        num_classes: Classes.
        outputs: Number of last positions that have a class each; 0 if the whole sequence has one.
        padding: Symbol after the end of shorter sequences; None if all have the same length.
    """

    vocab_size: int
    num_classes: int
    outputs: int = 0
    padding: Optional[int] = None


class Stored(Dataset):
    """Sequences of symbols or pixels, uint8 [n, length], and their classes [n]; pixels become numbers from -1 to 1."""

    def __init__(self, task: Task, inputs: np.ndarray, targets: np.ndarray) -> None:
        self.task, self.inputs, self.targets = task, inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: Key) -> Tuple[Tensor, int]:
        """By index, or by a pair of a seed, which is not used, and an index."""
        index = key[1] if isinstance(key, tuple) else key
        row = torch.from_numpy(self.inputs[index])
        return row.long() if self.task.vocab_size else row.float() / 127.5 - 1, int(self.targets[index])


class Fresh(Dataset):
    """Sequences that are drawn when they are asked for: input [length] and targets [outputs].

    Those of a split are always the same, except in training.
    """

    def __init__(self, task: Task, draw: Callable[..., Tuple[np.ndarray, np.ndarray]], count: int, split: str) -> None:
        self.task, self.draw, self.count, self.split = task, draw, count, split

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, key: Key) -> Tuple[Tensor, Tensor]:
        """By a pair of a seed and an index; by an index alone always the same."""
        seed = key if isinstance(key, tuple) else (SPLITS.index(self.split), key)
        inputs, targets = self.draw(np.random.default_rng(seed))
        return torch.from_numpy(inputs), torch.from_numpy(targets)


FRESH: Dict[str, Tuple[Task, Callable[..., Tuple[np.ndarray, np.ndarray]]]] = {
    'selective_copying': (Task(synthetic.VOCABULARY, synthetic.VOCABULARY, 16), synthetic.selective_copying),
    'induction_heads': (Task(synthetic.VOCABULARY, synthetic.VOCABULARY, 1), synthetic.induction_heads),
}
FILES = {
    'listops': Task(listops.VOCABULARY, 10, padding=listops.PAD),
    **{name: Task(0, 2) for name in COUNTS if name.startswith(PATHFINDER)},
}
PIXELS = {'mnist5k': Task(0, 10), 'digits': Task(0, 10)}
NAMES = (*FRESH, *FILES, *PIXELS)
COUNTS_OF_FRESH = {'train_count': 65_536, 'validation_count': 1_024}


def load_task(name: str, split: str, folder: Optional[str] = None, **options: Any) -> Dataset:
    """A split of a task, with the attribute `task`.

    Args:
        name: One of NAMES.
        split: 'train', 'validation' or 'test'. The packaged images have no test split.
        folder: Of `vmamba make-sequences`, for ListOps and Pathfinder.
        **options: For fresh sequences: `length`, for selective copying `tokens`, and the numbers of sequences
            `train_count` and `validation_count`.

    Raises:
        UserError: If there is no such task, split, folder or option.
    """
    task = definition(name, **options)
    if split not in SPLITS:
        raise UserError(f'split {split!r} of {PREFIX}{name} must be one of {", ".join(SPLITS)}')
    if name in FRESH:
        train, held_out = (options.pop(key, count) for key, count in COUNTS_OF_FRESH.items())
        data = Fresh(task, partial(FRESH[name][1], **options), train if split == 'train' else held_out, split)
        try:
            data[0]
        except (TypeError, ValueError) as error:
            raise UserError(f'{PREFIX}{name}: {error}') from error
        return data
    if name in PIXELS:
        images = IMAGES[name]()
        indices = images.splits().get(split)
        if indices is None:
            raise UserError(f'{PREFIX}{name} has no {split} split, only train and validation')
        return Stored(task, images.images[indices].reshape(len(indices), -1), images.labels[indices])
    return _from_files(name, split, folder)


def definition(name: str, **options: Any) -> Task:
    """What a model has to know of a task; see `load_task`.

    Raises:
        UserError: If there is no such task or option.
    """
    if name not in NAMES:
        raise UserError(f'there is no task {PREFIX}{name}{nearest(name, NAMES)}')
    known = {*COUNTS_OF_FRESH, *signature(FRESH[name][1]).parameters} - {'rng'} if name in FRESH else set()
    for key in options:
        if key not in known:
            raise UserError(f'{PREFIX}{name} has no option {key!r}{nearest(key, known)}')
    if name not in FRESH:
        return {**FILES, **PIXELS}[name]
    task = FRESH[name][0]
    return task._replace(outputs=options.get('tokens', task.outputs))


def _from_files(name: str, split: str, folder: Optional[str]) -> Stored:
    path = Path(folder or f'data/{name}') / f'{split}.npz'
    if not path.is_file():
        raise UserError(f'there is no {path}: make it by `vmamba make-sequences {name} --output {path.parent}`')
    with np.load(path) as arrays:
        return Stored(FILES[name], arrays['inputs'], arrays['targets'])
