"""Checkpoints for models of mmdet and mmseg, loaded whole and without running code from them."""

import logging
import re
import textwrap
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log
from torch import nn
from vmamba.tools.user_errors import UserError, listed, nearest

from vmamba.models._pretrained import check_sums

MAX_MESSAGE = 800  # characters about weights that do not fit
MAX_KEYS = 5  # of each kind in it
OUTPUT_NORM = re.compile(r'(^|\.)outnorm\d+\.(weight|bias)$')  # official checkpoints may lack those of the backbones


def read_checkpoint(path: str) -> Dict[str, Any]:
    """The content of a checkpoint file, without running any code that it may hold.

    Raises:
        UserError: If there is no such file, or it is damaged or no checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(f'there is no checkpoint {path}')
    try:
        check_sums(Path(path))
        with torch.serialization.safe_globals(harmless_types()):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a broken file makes the reader stumble over
        raise UserError(
            f'{path} is no checkpoint that can be read safely: {textwrap.shorten(str(error), 120)}'
        ) from error


def harmless_types() -> List[Any]:
    """What mmengine's checkpoints hold beside tensors: the log's numbers, in arrays of NumPy."""
    builders = [value.__reduce__()[0] for value in (np.zeros(1), np.float64(0))]
    modules = ('numpy.core.multiarray', 'numpy._core.multiarray')  # before and since NumPy 2
    named = [(builder, f'{module}.{builder.__name__}') for builder in builders for module in modules]
    dtypes = [type(np.dtype(code)) for code in '?bhilBHILefd']
    return [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *named, (_statistics, 'builtins.getattr')]


def _statistics(owner: Any, name: str) -> Any:
    """The attribute of the log's class that its pickle names; of anything else there is none."""
    if owner is not HistoryBuffer:
        raise ValueError(f'a checkpoint may not ask for the attribute {name} of {owner}')
    return getattr(owner, name)


def load_weights(model: nn.Module, checkpoint: Dict[str, Any], path: str, fresh: Sequence[str] = ()) -> None:
    """Loads all weights of the model, except the norms of a backbone's outputs where the checkpoint has others.

    Args:
        model: All of it, without wrappers.
        checkpoint: What the file holds.
        path: The file, for messages.
        fresh: Names of modules or weights that keep their own, whatever the checkpoint has for them.

    Raises:
        UserError: If another weight is missing, unexpected or of another shape, with the first of their names.
    """
    check_names(model, fresh)
    given, own = checkpoint.get('state_dict', checkpoint), model.state_dict()
    state = {key: value for key, value in given.items() if not within(key, fresh)}
    state.update((key, value) for key, value in own.items() if within(key, fresh))
    try:
        missing, unexpected = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise misfit(path, str(error)) from error
    differing = [key for key in (*missing, *unexpected) if OUTPUT_NORM.search(key)]
    missing, unexpected = ([key for key in keys if key not in differing] for keys in (missing, unexpected))
    if missing or unexpected:
        kinds = {'missing': missing, 'unexpected': unexpected}
        raise misfit(path, '; '.join(f'{kind} {first(keys)}' for kind, keys in kinds.items() if keys))
    for keys, what in ((differing, 'norms of outputs that only one of model and checkpoint has'), (fresh, 'as asked')):
        if keys:
            print_log(f'{path}: not loaded, {what}: {", ".join(keys)}', logger='current', level=logging.WARNING)


def check_names(model: nn.Module, fresh: Sequence[str]) -> None:
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())} - {''}
    for name in fresh:
        if name not in names:
            raise UserError(f'the model has no module or weight {name!r} to keep fresh{nearest(name, names)}')


def within(key: str, modules: Sequence[str]) -> bool:
    return any(f'{key}.'.startswith(f'{module}.') for module in modules)


def misfit(path: str, problem: str) -> UserError:
    message = textwrap.shorten(problem, MAX_MESSAGE, placeholder=' ...')
    return UserError(f'{path} does not fit the config: {message}')


def first(keys: Sequence[str]) -> str:
    return listed(keys, MAX_KEYS)
