"""Checkpoints of mmdet and mmseg models, read without running code from them, and loaded completely."""

import logging
import re
import textwrap
from typing import Any, Dict, Sequence

from mmengine.logging import print_log
from torch import nn

from vmamba.models._pretrained import check_fit, read_file
from vmamba.tools.user_errors import UserError, nearest

MAX_MESSAGE = 800  # characters
OUTPUT_NORM = re.compile(r'(^|\.)outnorm\d+\.(weight|bias)$')  # official checkpoints may lack those of the backbones


def read_checkpoint(path: str) -> Dict[str, Any]:
    """The content of a checkpoint file. No code in it is run, unlike by mmengine.

    The averages of mmengine's log are left out: to read them, their class would have to be built.

    Raises:
        UserError: If there is no such file, or it is damaged or no checkpoint.
    """
    try:
        checkpoint = read_file(path)
    except (OSError, RuntimeError) as error:
        raise UserError(textwrap.shorten(str(error), MAX_MESSAGE)) from error
    for hub in [checkpoint['message_hub']] if 'message_hub' in checkpoint else []:
        resumed = {key: value for key, value in hub['resumed_keys'].items() if key in hub['runtime_info']}
        hub.update(log_scalars={}, resumed_keys=resumed)
    return checkpoint


def load_weights(model: nn.Module, checkpoint: Dict[str, Any], path: str, fresh: Sequence[str] = ()) -> None:
    """Loads all weights of a model. Only the norms of a backbone's outputs may differ; this is a warning.

    Modules or weights that are named as fresh keep their values, whatever the checkpoint has for them.

    Raises:
        UserError: If another weight is missing, unexpected or of another shape, with the first of their names.
    """
    names = {name for name, _ in (*model.named_modules(), *model.named_parameters())} - {''}
    for name in fresh:
        if name not in names:
            raise UserError(f'the model has no module or weight {name!r} to keep fresh{nearest(name, names)}')
    state, own = checkpoint.get('state_dict', checkpoint), model.state_dict()
    norms = [key for key in own.keys() ^ state.keys() if OUTPUT_NORM.search(key)]
    kept = [key for key in own.keys() | state.keys() if within(key, fresh)]
    try:
        check_fit(state, model, path, {*norms, *kept}, advice='Give a checkpoint of this config')
    except RuntimeError as error:
        raise UserError(textwrap.shorten(str(error), MAX_MESSAGE, placeholder=' ...')) from error
    model.load_state_dict({key: value for key, value in state.items() if key not in kept}, strict=False)
    for keys, what in ((norms, 'norms of outputs that only one side has'), (fresh, 'as asked')):
        if keys:
            print_log(f'{path}: not loaded, {what}: {", ".join(keys)}', logger='current', level=logging.WARNING)


def within(key: str, modules: Sequence[str]) -> bool:
    """Whether a weight lies in one of the modules, or is named itself."""
    return any(f'{key}.'.startswith(f'{module}.') for module in modules)
