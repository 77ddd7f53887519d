"""Checkpoints of mmdet and mmseg models, read without running code from them, and loaded completely."""

import logging
import re
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from torch import nn

from vmamba.models._pretrained import check_sums
from vmamba.tools.user_errors import UserError, listed, nearest

MAX_MESSAGE = 800  # characters
OUTPUT_NORM = re.compile(r'(^|\.)outnorm\d+\.(weight|bias)$')  # official checkpoints may lack those of the backbones


def read_checkpoint(path: str) -> Dict[str, Any]:
    """The content of a checkpoint file. No code in it is run, unlike by mmengine.

    Raises:
        UserError: If there is no such file, or it is damaged or no checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(f'there is no checkpoint {path}')
    try:
        check_sums(Path(path))
        with torch.serialization.safe_globals(harmless_types()):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # a broken file can raise anything in the reader
        reason = textwrap.shorten(str(error), 120)
        raise UserError(f'{path} is no checkpoint that can be read safely: {reason}') from error


def harmless_types() -> List[Any]:
    """What mmengine's checkpoints hold in addition to tensors: the log's numbers, in arrays of NumPy."""
    builders = [value.__reduce__()[0] for value in (np.zeros(1), np.float64(0))]
    modules = ('numpy.core.multiarray', 'numpy._core.multiarray')  # before and since NumPy 2
    named = [(builder, f'{module}.{builder.__name__}') for builder in builders for module in modules]
    dtypes = [type(np.dtype(code)) for code in '?bhilBHILefd']
    return [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *named, (_statistics, 'builtins.getattr')]


def _statistics(owner: Any, name: str) -> Any:
    """The attributes of the log's class, which its pickle names; those of anything else are refused."""
    if owner is not HistoryBuffer:
        raise ValueError(f'a checkpoint may not ask for the attribute {name} of {owner}')
    return getattr(owner, name)


def load_weights(model: nn.Module, checkpoint: Dict[str, Any], path: str, fresh: Sequence[str] = ()) -> None:
    """Loads all weights of a model. Only the norms of a backbone's outputs may differ; this is a warning.

    Args:
        model: Without wrappers.
        checkpoint: What the file holds.
        path: The file, for messages.
        fresh: Names of modules or weights that keep their values, whatever the checkpoint has for them.

    Raises:
        UserError: If another weight is missing, unexpected or of another shape, with the first of their names.
    """
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())} - {''}
    for name in fresh:
        if name not in names:
            raise UserError(f'the model has no module or weight {name!r} to keep fresh{nearest(name, names)}')
    state = {key: value for key, value in checkpoint.get('state_dict', checkpoint).items() if not within(key, fresh)}
    state.update((key, value) for key, value in model.state_dict().items() if within(key, fresh))
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
        kinds = {'missing': missing, 'unexpected': unexpected}
        wrong = {kind: [key for key in keys if not OUTPUT_NORM.search(key)] for kind, keys in kinds.items()}
        if any(wrong.values()):
            raise RuntimeError('; '.join(f'{kind} {listed(keys, 5)}' for kind, keys in wrong.items() if keys))
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), MAX_MESSAGE, placeholder=' ...')
        raise UserError(f'{path} does not fit the config: {reason}') from error
    for keys, what in (([*missing, *unexpected], 'norms of outputs that only one side has'), (fresh, 'as asked')):
        if keys:
            print_log(f'{path}: not loaded, {what}: {", ".join(keys)}', logger='current', level=logging.WARNING)


def within(key: str, modules: Sequence[str]) -> bool:
    """Whether a weight lies in one of the modules, or is named itself."""
    return any(f'{key}.'.startswith(f'{module}.') for module in modules)
