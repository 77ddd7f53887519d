"""The backbone under the official name and with the official arguments, so that official configs load unchanged.

https://github.com/MzeroMiko/VMamba (MIT), detection/ and segmentation/
"""

import logging
from typing import Any, Dict, Optional, Sequence, Tuple, Union

from mmengine.logging import print_log
from mmengine.registry import MODELS

from .backbones import VMambaBackbone

_STEMS = {'v1': 'patch', 'v2': 'conv'}
_DOWNSAMPLES = {'v1': 'patch', 'v3': 'conv'}
# Official names of implementations of the same scan, with and without the gate.
_GATED = ('v0', 'v2', 'v3', 'v4', 'v5', 'v05')
_UNGATED = tuple(f'{name}{mark}' for name in _GATED[1:] for mark in ('noz', '_noz'))
# Official arguments of which one value is supported.
_FIXED = {
    'patch_size': 4, 'patch_norm': True, 'ssm_dt_rank': 'auto', 'ssm_conv': 3, 'ssm_act_layer': 'silu',
    'ssm_drop_rate': 0.0, 'ssm_init': 'v0', 'mlp_act_layer': 'gelu', 'mlp_drop_rate': 0.0, 'gmlp': False,
    'posembed': False,
}  # fmt: skip
# Arguments that official configs inherit from Swin Transformer's, or that the official backbone ignores.
_IGNORED = {
    'init_cfg', 'attn_drop_rate', 'convert_weights', 'drop_rate', 'embed_dims', 'num_heads', 'qk_scale', 'qkv_bias',
    'window_size', 'pretrain_img_size', 'strides', 'use_abs_pos_embed', 'act_cfg', 'norm_cfg', 'num_classes', 'imgsize',
}  # fmt: skip


@MODELS.register_module()
class MM_VSSM(VMambaBackbone):  # noqa: N801
    """`VMambaBackbone` with the official arguments; unsupported values are errors.

    As in the official code, arguments inherited from Swin Transformer's configs are ignored, including `init_cfg`:
    weights are loaded from `pretrained` only. `with_cp` is not ignored: it works like `use_checkpoint`.

    Args:
        dims: Channels of the first stage, or of each stage.
        depths: Blocks per stage.
        out_indices: Stages whose outputs are returned.
        pretrained: Classification checkpoint; '' or None for none.
        ssm_d_state: State dimension N.
        ssm_ratio: Inner channels of SS2D over the stage's channels.
        ssm_conv_bias: Whether SS2D's convolutions have a bias.
        forward_type: Official name of the scan's implementation; here it only selects whether there is a gate.
        mlp_ratio: Hidden channels of the MLPs over the stage's channels; 0 for no MLPs.
        downsample_version: 'v1' or 'v3'.
        patchembed_version: 'v1' or 'v2'.
        drop_path_rate: Stochastic depth rate of the last block.
        norm_layer: 'ln' or 'ln2d', with the same result.
        use_checkpoint: Recompute each block's activations in the backward pass.
        frozen_stages: See `VMambaBackbone`.
        in_chans: Image channels.
        with_cp: Same as `use_checkpoint`.
        **others: Other official arguments at their one supported value, and ignored ones of Swin Transformer.

    Raises:
        ValueError: If an argument has an unsupported value.
        TypeError: If an argument is unknown.
    """

    def __init__(
        self,
        dims: Union[int, Sequence[int]] = 96,
        depths: Sequence[int] = (2, 2, 9, 2),
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: Optional[str] = None,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_conv_bias: bool = True,
        forward_type: str = 'v2',
        mlp_ratio: float = 4.0,
        downsample_version: str = 'v2',
        patchembed_version: str = 'v1',
        drop_path_rate: float = 0.1,
        norm_layer: str = 'ln',
        use_checkpoint: bool = False,
        frozen_stages: int = -1,
        in_chans: int = 3,
        with_cp: bool = False,
        **others: Any,
    ) -> None:
        unknown = sorted(set(others) - _IGNORED - set(_FIXED))
        if unknown:
            raise TypeError(f'MM_VSSM got unknown arguments: {", ".join(unknown)}')
        for name in set(others) & set(_FIXED):
            _choose(name, others[name], {_FIXED[name]: None})
        if others.get('init_cfg') and not pretrained:
            print_log(f'MM_VSSM ignores init_cfg ({others["init_cfg"]})', logger='current', level=logging.WARNING)
        depths = _depths(depths)
        norm = norm_layer.lower() if isinstance(norm_layer, str) else norm_layer
        _choose('norm_layer', norm, {'ln': None, 'ln2d': None})
        options = dict(
            in_chans=in_chans,
            depths=depths,
            embed_dim=_embed_dim(dims, len(depths)),
            ssm_ratio=ssm_ratio,
            d_state=ssm_d_state,
            conv_bias=ssm_conv_bias,
            gate=_choose(
                'forward_type', forward_type, {**dict.fromkeys(_GATED, True), **dict.fromkeys(_UNGATED, False)}
            ),
            mlp_ratio=mlp_ratio,
            stem=_choose('patchembed_version', patchembed_version, _STEMS),
            downsample=_choose('downsample_version', downsample_version, _DOWNSAMPLES),
        )
        super().__init__(
            'vmamba_t',
            out_indices,
            drop_path_rate=drop_path_rate,
            frozen_stages=frozen_stages,
            with_cp=use_checkpoint or with_cp,
            pretrained=pretrained,
            model_options=options,
        )


def _choose(name: str, value: Any, known: Dict[Any, Any]) -> Any:
    if value not in list(known):  # a list, as the value may be unhashable
        raise ValueError(f'{name} must be one of {", ".join(map(str, known))}, got {value!r}')
    return known[value]


def _depths(depths: Any) -> Tuple[int, ...]:
    if not isinstance(depths, (tuple, list)) or not depths:
        raise ValueError(f'depths must be a tuple or list with the number of blocks of each stage, got {depths!r}')
    return tuple(depths)


def _embed_dim(dims: Union[int, Sequence[int]], stages: int) -> int:
    if isinstance(dims, int):
        return dims
    if not isinstance(dims, (tuple, list)) or list(dims) != [dims[0] * 2**i for i in range(stages)]:
        raise ValueError(f'dims must double from stage to stage for {stages} stages, got {dims!r}')
    return dims[0]
