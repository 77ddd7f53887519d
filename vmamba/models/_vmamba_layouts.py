"""The layouts in which VMamba checkpoints are found."""

import re
from typing import Dict, Tuple

from torch import Tensor

from ._dense_layouts import split_backbone

_LEGACY_NAMES = (
    (r'^patch_embed\.proj\.', 'patch_embed.0.'),
    (r'^patch_embed\.norm\.', 'patch_embed.2.'),
    (r'\.ln_1\.', '.norm.'),
    (r'\.self_attention\.', '.op.'),
    (r'\.downsample\.norm\.', '.downsample.1.'),
    (r'\.downsample\.reduction\.', '.downsample.2.'),
    (r'^norm\.', 'classifier.norm.'),
    (r'^head\.', 'classifier.head.'),
)
_RENAMES = (
    (r'^layers\.(\d+)\.blocks\.(\d+)\.norm\.', r'stages.\1.blocks.\2.norm1.'),
    (r'^layers\.(\d+)\.blocks\.(\d+)\.op\.', r'stages.\1.blocks.\2.mixer.'),
    (r'^layers\.(\d+)\.blocks\.', r'stages.\1.blocks.'),
    (r'\.x_proj_weight$', '.x_proj.weight'),
    (r'\.dt_projs[._]', '.dt_proj_'),
    (r'\.A_logs$', '.A_log'),
    (r'\.Ds$', '.D'),
    (r'^classifier\.norm\.', 'norm.'),
    (r'^classifier\.head\.', 'head.fc.'),
)


def convert_layout(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Renames and reshapes any official layout of VMamba to this library's, which itself passes unchanged.

    Known layouts: the release's, its legacy names, the one-file code's, linear layers as 1x1 convolutions, and the
    backbone of a detection or segmentation checkpoint, official or of this library, whose `outnorm3` becomes the final
    norm.
    """
    state_dict, norms = split_backbone(state_dict)
    norms = {key.replace('outnorm3.', 'norm.'): value for key, value in norms.items() if key.startswith('outnorm3.')}
    if not any(key.startswith(('layers.', 'patch_embed.')) for key in state_dict):
        return {**norms, **state_dict}
    state_dict = {_rename(key, _LEGACY_NAMES): value for key, value in {**norms, **state_dict}.items()}
    names = _sequential_names(state_dict)
    out = {}
    for key, value in state_dict.items():
        module, _, parameter = key.rpartition('.')
        key = f'{names[module]}.{parameter}' if module in names else _rename(key, _RENAMES)
        out[key] = _reshape(key, value)
    return out


def _rename(key: str, rules: Tuple[Tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _sequential_names(state_dict: Dict[str, Tensor]) -> Dict[str, str]:
    """Names of the stem's and downsamplers' modules, whose numbers differ between layouts: told by weight and order."""
    names = {}
    convs: Dict[str, int] = {}
    norms: Dict[str, int] = {}
    numbered = re.compile(r'(patch_embed|layers\.\d+\.downsample)\.\d+(?=\.weight$)')
    modules = [match[0] for match in map(numbered.match, state_dict) if match]
    two_convs = sum(module.startswith('patch_embed.') for module in modules) == 4
    for module in sorted(modules, key=lambda name: [int(part) for part in re.findall(r'\d+', name)]):
        parent = module.rpartition('.')[0]
        weight = state_dict[f'{module}.weight']
        is_norm = weight.ndim == 1
        count = norms if is_norm else convs
        count[parent] = count.get(parent, 0) + 1
        if parent == 'patch_embed':
            number = str(count[parent]) if two_convs else ''
            names[module] = f'stem.{"norm" if is_norm else "conv"}{number}'
        else:
            stage = int(re.findall(r'\d+', parent)[0]) + 1
            is_conv = weight.ndim == 4 and weight.shape[-1] > 1
            names[module] = f'stages.{stage}.downsample.{"norm" if is_norm else "conv" if is_conv else "reduction"}'
    return names


def _reshape(key: str, value: Tensor) -> Tensor:
    """One parameter in this library's shape; one of a shape of no known layout passes unchanged, so does not fit."""
    if key.endswith('.x_proj.weight'):  # [4, R + 2N, D] or [4 * (R + 2N), D(, 1, 1)]
        return value.flatten(0, 1) if value.ndim == 3 and value.shape[0] == 4 else _matrix(value)
    if key.endswith('.dt_proj_weight'):  # [4, D, R] or [4 * D, R(, 1, 1)]
        return value if value.ndim == 3 and value.shape[0] == 4 else _routes(_matrix(value), 2)
    if key.endswith('.A_log'):  # [4 * D, N]
        return _routes(value, 2)
    if key.endswith(('.dt_proj_bias', '.D')):  # [4, D] or [4 * D]
        return _routes(value, 1)
    if key.endswith(('_proj.weight', '.fc1.weight', '.fc2.weight', '.fc.weight', '.reduction.weight')):
        return _matrix(value)
    return value


def _matrix(value: Tensor) -> Tensor:
    """[m, n, 1, ...] -> [m, n]: a linear layer written as a convolution of width 1"""
    return value.flatten(1) if value.ndim > 2 and value.shape[2:].numel() == 1 else value


def _routes(value: Tensor, ndim: int) -> Tensor:
    """[4 * D, ...] of that many dimensions -> [4, D, ...]"""
    if value.ndim != ndim or value.shape[0] % 4:
        return value
    return value.unflatten(0, (4, value.shape[0] // 4))
