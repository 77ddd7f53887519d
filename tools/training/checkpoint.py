"""The checkpoints of a run.

They are not those of timm's CheckpointSaver: an interrupted run resumes exactly, from files that are written atomically
and whose checksums are verified.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch

from vmamba.models._pretrained import read_file
from vmamba.tools.output_files import write_atomically
from vmamba.tools.user_errors import UserError, changes

from .config import Config

# Keys that may change when a run is resumed: where, how and how long it runs. Images per step are checked separately.
FREE_KEYS = {
    *('output', 'workers', 'log', 'log_every', 'checkpoint_every', 'keep_checkpoints', 'device', 'compile', 'epochs'),
    *('batch_size', 'accumulate', 'val_batch_size', 'data_dir', 'skip_bad_images', 'grad_checkpointing', 'shard'),
    *('pretrained', 'checkpoint', 'new_head', 'teacher_checkpoint'),
}
_NAMES_SHOWN = 5
_PATTERN = re.compile(r'checkpoint-(\d{8,})\.pt')


class Checkpoints:
    """The newest checkpoints of a run in its folder, named by the number of updates; several, in case one is broken."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep
        self.broken: List[Path] = []  # newer than the loaded one; they must not displace good ones

    def paths(self) -> List[Path]:
        """From the newest to the oldest."""
        return sorted(filter(_updates, self.folder.glob('checkpoint-*')), key=_updates, reverse=True)

    def save(self, state: Dict[str, Any], update: int) -> Path:
        """Writes a checkpoint, then removes what is broken or too old."""
        path = self.folder / f'checkpoint-{update:08d}.pt'
        write_atomically(path, lambda file: torch.save(state, file))
        broken = [old for old in self.broken if old != path]
        good = [old for old in self.paths() if old not in broken]
        for old in (*broken, *good[self.keep :]):
            old.unlink()
        self.broken = []
        return path

    def remove_parts(self) -> None:
        """Removes incomplete files of killed runs."""
        for path in self.folder.glob('.*.part'):
            path.unlink()

    def save_best(self, state: Dict[str, Any]) -> None:
        """Writes the weights of the best score; they are all that is needed of it."""
        write_atomically(self.folder / 'best.pt', lambda file: torch.save(state, file))

    def load_newest(self, warn: Callable[[str], None]) -> Optional[Tuple[Dict[str, Any], Path]]:
        """The newest readable checkpoint; only tensors and plain values are unpickled.

        Returns:
            Its content and its path, or None if there is no checkpoint.

        Raises:
            UserError: If there are only broken ones.
        """
        paths = self.paths()
        for number, path in enumerate(paths):
            try:
                state = read_file(path)
            except (OSError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0][:200]
                warn(f'skipped the broken checkpoint {path}, which the next one replaces: {reason}')
            else:
                self.broken = paths[:number]
                return state, path
        if paths:
            raise UserError(f'all {len(paths)} checkpoints in {self.folder} are broken; restart in another --output')
        return None


def _updates(path: Path) -> int:
    """Number of updates in the name of a checkpoint, 0 if it is none."""
    found = _PATTERN.fullmatch(path.name)
    return int(found[1]) if found else 0


def check_output(output: str, resume: bool) -> None:
    """Raises UserError if the folder holds a run that is not to be resumed."""
    if Checkpoints(Path(output), 1).paths() and not resume:
        raise UserError(f'{output} holds a run already: --resume continues it, another --output starts a new one')


def check_same_run(state: Dict[str, Any], ours: Dict[str, Any], path: Path) -> None:
    """Raises UserError for a checkpoint that differs from what this run would write, other than in free keys."""
    state = {'data': ours['data'], **state}  # older checkpoints do not record the data
    was, now = _facts(state), _facts(ours)
    differences = changes(was, now)
    if differences:
        raise UserError(f'{path} is of a run with {differences}; give what it had, or another --output')
    names = state['data']['classes'], ours['data']['classes']
    if names[0] != names[1]:
        raise UserError(f'{path} is of a run with other classes: {_differences(*names)}; give the data that it had')


def _facts(state: Dict[str, Any]) -> Dict[str, Any]:
    config = {**dataclasses.asdict(Config()), **state['config']}
    counts = {key: value for key, value in state['data'].items() if key != 'classes'}
    keys = config.keys() - FREE_KEYS - {'num_classes'}
    sizes = {'num_classes': state['num_classes'], 'images per update': state['update_size']}
    return {**{key: config[key] for key in keys}, **sizes, **counts}


def _differences(was: Optional[List[str]], now: Optional[List[str]]) -> str:
    """Classes that only one of the two has."""
    lost, new = ([name for name in a or () if name not in (b or ())] for a, b in ((was, now), (now, was)))
    parts = [f'{word} {", ".join(names[:_NAMES_SHOWN])}' for word, names in (('without', lost), ('with', new)) if names]
    return f'now {" and ".join(parts)}' if parts else 'now in another order'
