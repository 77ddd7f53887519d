"""The layout in which official Vim checkpoints are found, and what fits a checkpoint to a model."""

import logging
import math
import re
from typing import Dict, Optional, Tuple

import torch
from timm.layers import to_2tuple
from timm.models import get_pretrained_cfg_value
from torch import Tensor, nn

from ..layers import resize_pos_embed

_logger = logging.getLogger(__name__)

_RENAMES = (
    (r'^(pos_embed|cls_token)$', r'embed.\1'),
    (r'^patch_embed\.', 'embed.'),
    (r'^norm_f\.', 'norm.'),
    (r'^layers\.', 'blocks.'),
    (r'\.mixer\.gamma$', '.ls.gamma'),
    (r'\.(A|D)_b(_log)?$', r'.\1\2_b'),
    (r'\.(conv1d|x_proj|dt_proj)(_b)?\.(weight|bias)$', r'.\1_\3\2'),
)
_STATE_SIZE = "state the checkpoint's image size: pretrained_cfg_overlay=dict(file=..., input_size=(3, height, width))"
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
    """Stacks each directional parameter with its `_b`.

    One without its partner is left out, so missing; a pair of unequal shapes, or of which only one is floating, passes
    unchanged, so does not fit.
    """
    out = {}
    for key, value in state_dict.items():
        if not re.search(_DIRECTIONAL, key):
            out[key] = value
        elif f'{key}_b' in state_dict:
            backward = state_dict[f'{key}_b']
            if value.shape != backward.shape or value.is_floating_point() != backward.is_floating_point():
                out.update({key: value, f'{key}_b': backward})
                continue
            pair = torch.stack([value, backward])
            out[key] = pair.squeeze(2) if pair.ndim == 4 else pair  # conv1d_weight [2, D, 1, w] -> [2, D, w]
    return out


def fold_layer_scale(state_dict: Dict[str, Tensor], own: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Multiplies the mixers' scales `ls.gamma` into out_proj where the model has none; what does not fit stays."""
    out = dict(state_dict)
    for key in [key for key in out if key.endswith('.ls.gamma') and key not in own]:
        name = key.replace('.ls.gamma', '.mixer.out_proj.weight')
        weight = out.get(name)
        floating = weight is not None and weight.is_floating_point() and out[key].is_floating_point()
        if floating and weight.shape[:1] == out[key].shape:
            out[name] = weight * out.pop(key).unsqueeze(-1)
    return out


def fit_pos_embed(pos_embed: Tensor, model: nn.Module, official: bool) -> Tensor:
    """Resizes a position embedding [1, h * w + 1, d] to the model's grid of patches.

    Its own grid is that of the image size that the checkpoint states. Where it states none, official embeddings are of
    square images, and others are the model's if their length is, which is a guess unless the model's grid is a square.
    """
    patches, grid = pos_embed.shape[1] - 1, model.embed.grid_size
    source = None if official else _stated_grid(model, patches)
    side = math.isqrt(patches)
    if source is None and patches == math.prod(grid) and not (official and side * side == patches):
        if not official and grid[0] != grid[1]:
            taken = 'the position embedding of %d patches is taken for one of %dx%d; if it is of another grid, %s'
            _logger.warning(taken, patches, *grid, _STATE_SIZE)
        return pos_embed
    if source is None and side * side != patches:
        shape = tuple(pos_embed.shape)
        raise RuntimeError(f'pos_embed {shape} is not that of a square image: {_STATE_SIZE}')
    stated, source = source is not None, source or (side, side)
    if source != grid:
        doubt = '' if stated else _doubt_about_stride(model, source)
        _logger.warning('resizing the position embedding from %dx%d to %dx%d patches%s', *source, *grid, doubt)
    return resize_pos_embed(pos_embed, source, grid)


def _doubt_about_stride(model: nn.Module, grid: Tuple[int, int]) -> str:
    """Names the stride, without gaps between patches, at which the model's image size has another grid, if any."""
    embed = model.embed
    for stride in range(1, embed.patch_size + 1):
        if all(n * stride == side - embed.patch_size + stride for n, side in zip(grid, embed.img_size)):
            return (
                f'; images of {embed.img_size[0]}x{embed.img_size[1]} have {grid[0]}x{grid[1]} patches at stride '
                f'{stride}, and the model has stride {embed.stride}: the checkpoint may be of another variant'
            )
    return ''


def _stated_grid(model: nn.Module, patches: int) -> Optional[Tuple[int, int]]:
    """Grid of the image size in the checkpoint's model arguments, or in a configuration that is not the variant's own.

    None if there is none, or it has another number of patches.
    """
    size = getattr(model, 'pretrained_model_args', {}).get('img_size')
    if size is None:
        cfg = getattr(model, 'pretrained_cfg', {})
        image = cfg.get('input_size')
        if image is None or image == get_pretrained_cfg_value(cfg['architecture'], 'input_size'):
            return None
        size = image[1:]
    try:
        grid = model.embed.dynamic_feat_size(to_2tuple(size))
    except ValueError:
        return None
    return grid if math.prod(grid) == patches else None
