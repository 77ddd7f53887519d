"""The layout in which official Vim checkpoints are found."""

import re
from typing import Dict

import torch
from torch import Tensor

_RENAMES = (
    (r'^(pos_embed|cls_token)$', r'embed.\1'),
    (r'^patch_embed\.', 'embed.'),
    (r'^norm_f\.', 'norm.'),
    (r'^layers\.', 'blocks.'),
    (r'\.mixer\.gamma$', '.ls.gamma'),
    (r'\.(A|D)_b(_log)?$', r'.\1\2_b'),
    (r'\.(conv1d|x_proj|dt_proj)(_b)?\.(weight|bias)$', r'.\1_\3\2'),
)
_DIRECTIONAL = r'\.mixer\.(conv1d_weight|conv1d_bias|x_proj_weight|dt_proj_weight|dt_proj_bias|A_log|D)(_b)?$'


def is_official(state_dict: Dict[str, Tensor]) -> bool:
    return any(key.startswith('layers.') for key in state_dict)


def convert_layout(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Renames the official layout to this library's and stacks the two directions' parameters."""
    return _stack_directions({_rename(key): value for key, value in state_dict.items()})


def _rename(key: str) -> str:
    for pattern, replacement in _RENAMES:
        key = re.sub(pattern, replacement, key)
    return key


def _stack_directions(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Stacks each directional parameter with its `_b`; one without its partner is left out, so missing."""
    out = {}
    for key, value in state_dict.items():
        if not re.search(_DIRECTIONAL, key):
            out[key] = value
        elif f'{key}_b' in state_dict:
            pair = torch.stack([value, state_dict[f'{key}_b']])
            out[key] = pair.squeeze(2) if key.endswith('conv1d_weight') else pair  # [2, D, 1, w] -> [2, D, w]
    return out
