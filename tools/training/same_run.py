"""Whether a checkpoint belongs to the run that resumes from it."""

import dataclasses
from pathlib import Path
from typing import Any, Dict, List, Optional

from vmamba.tools.user_errors import UserError, changes

from .config import Config

# Keys that may change at a resume: where, how and how long the run is. The size of an update is checked separately.
FREE_KEYS = {
    *('output', 'workers', 'log', 'log_every', 'checkpoint_every', 'keep_checkpoints', 'device', 'compile', 'epochs'),
    *('batch_size', 'accumulate', 'val_batch_size', 'data_dir', 'skip_bad_images', 'grad_checkpointing', 'shard'),
    *('pretrained', 'checkpoint', 'new_head', 'teacher_checkpoint'),
}
_NAMES_SHOWN = 5


def check_same_run(state: Dict[str, Any], ours: Dict[str, Any], path: Path) -> None:
    """Raises UserError for a checkpoint of another run.

    Args:
        state: Content of the checkpoint.
        ours: What this run would write for the same keys: num_classes, update_size, config and data.
        path: Of the checkpoint.
    """
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
