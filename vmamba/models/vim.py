"""Vision Mamba (Vim)

Paper: `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model`
 - https://arxiv.org/abs/2401.09417

Official models and weights: https://github.com/hustvl/Vim (Apache-2.0). This code was written from scratch.
"""

import re
from typing import Any, Dict, Optional, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from ..layers import H3, S4D, Attention, BiMamba, BiMamba2, RmsNorm, SwitchMoE, residual_branches
from ..layers.options import check_choice, check_divides
from ._isotropic import NORM_EPS, TokenModel, create, fit_pos_embed
from ._pretrained import rename, split_backbone, with_fresh_norm

__all__ = ['Vim']


# Mixers by name, with their own number of states.
MIXERS = {'mamba': 16, 'mamba2': 64, 's4d': 64, 'h3': 64, 'attention': 0}


def make_mixer(
    mixer: str, dim: int, expand: float, d_state: Optional[int], d_conv: int, headdim: int, **dd: Any
) -> nn.Module:
    """A mixer [B, L, d] -> [B, L, d] that sees all tokens; options that it does not have are unused."""
    check_choice(MIXERS, mixer=mixer)
    states = MIXERS[mixer] if d_state is None else d_state
    if mixer == 'mamba':
        return BiMamba(dim, expand, states, d_conv=d_conv, **dd)
    if mixer == 'mamba2':
        return BiMamba2(dim, expand, states, headdim, d_conv, NORM_EPS, **dd)
    if mixer == 's4d':
        return S4D(dim, states, layout='block', bidirectional=True, **dd)
    if mixer == 'h3':
        return H3(dim, states, bidirectional=True, **dd)
    check_divides(dim, 'channels', headdim=headdim)
    return Attention(dim, dim // headdim, **dd)


class VimBlock(nn.Module):
    """x = x + drop_path(mixer(norm(x))), then x = x + drop_path2(mlp(norm2(x))) if there are experts; x is in fp32.

    Args:
        dim: Token channels d.
        expand: Ratio of the mixer's inner channels to d.
        d_state: State dimension N; the mixer's own by default.
        d_conv: Width of the causal convolutions.
        init_values: Initial value of the layer scale; None for no layer scale.
        drop_path: Stochastic depth rate.
        mixer: 'mamba' for `BiMamba`, 'mamba2' for `BiMamba2`, 's4d', 'h3' or 'attention'.
        headdim: Channels P of a head of `BiMamba2` and attention.
        mlp: 'none', or 'moe' for `SwitchMoE`.
        num_experts: Experts of `SwitchMoE`.
        capacity_factor: Of `SwitchMoE`.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 2.0,
        d_state: Optional[int] = None,
        d_conv: int = 4,
        init_values: Optional[float] = None,
        drop_path: float = 0.0,
        mixer: str = 'mamba',
        headdim: int = 64,
        mlp: str = 'none',
        num_experts: int = 8,
        capacity_factor: Optional[float] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = RmsNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        self.mixer = make_mixer(mixer, dim, expand, d_state, d_conv, headdim, **dd)
        self.ls = LayerScale(dim, init_values, **dd) if init_values is not None else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        check_choice(('none', 'moe'), mlp=mlp)
        self.has_mlp = mlp == 'moe'
        if self.has_mlp:
            self.norm2 = RmsNorm(dim, eps=NORM_EPS, autocast=True, **dd)
            self.mlp = SwitchMoE(dim, num_experts, capacity_factor=capacity_factor, **dd)
            self.ls2 = LayerScale(dim, init_values, **dd) if init_values is not None else None
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]"""
        x = _residual(x, self.norm, self.mixer, self.ls, self.drop_path)
        return _residual(x, self.norm2, self.mlp, self.ls2, self.drop_path2) if self.has_mlp else x


def _residual(x: Tensor, norm: nn.Module, module: nn.Module, ls: Optional[nn.Module], drop_path: nn.Module) -> Tensor:
    """x + drop_path(ls(module(norm(x)))), fused where that is possible without layer scale"""
    if ls is None:
        return residual_branches(x, (norm, module, drop_path))
    return x + drop_path(ls(module(norm(x))))


class Vim(TokenModel):
    """Vision Mamba backbone and classifier.

    Args:
        img_size: Image size; with `dynamic_img_size`, the size of the position embedding.
        patch_size: Side of a patch.
        stride: Distance between patches, patch_size by default; smaller values overlap, larger ones leave gaps.
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: 'token' for the class token, 'avg' for the mean of the patch tokens, '' for all tokens.
        embed_dim: Token channels d.
        depth: Number of blocks.
        expand: Ratio of the inner channels of 'mamba' and 'mamba2' to d.
        d_state: State dimension N; by default 16 of 'mamba', 64 of 'mamba2', 's4d' and 'h3'.
        d_conv: Width of the causal convolutions of 'mamba' and 'mamba2'.
        init_values: Initial value of the layer scale; None for no layer scale.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; rates grow linearly from 0.
        dynamic_img_size: Accept any image size that whole patches cover; each call resizes the position embedding.
        mixer: 'mamba', 'mamba2' for the scan of Mamba-2, 's4d', 'h3' or 'attention'; all but attention in both
            directions.
        headdim: Channels P of a head of 'mamba2' and 'attention'.
        mlp: 'none', or 'moe' for a mixture of experts after each mixer, as in MoE-Mamba: see `SwitchMoE`. Training adds
            `auxiliary_loss(model)` to the loss.
        num_experts: Experts of 'moe'.
        capacity_factor: Capacity of an expert in training, relative to an equal share of the tokens; None for no limit.
    """

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 16,
        stride: Optional[int] = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'token',
        embed_dim: int = 192,
        depth: int = 24,
        expand: float = 2.0,
        d_state: Optional[int] = None,
        d_conv: int = 4,
        init_values: Optional[float] = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        mixer: str = 'mamba',
        headdim: int = 64,
        mlp: str = 'none',
        num_experts: int = 8,
        capacity_factor: Optional[float] = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        block: Dict[str, Any] = dict(
            mixer=mixer, expand=expand, d_state=d_state, d_conv=d_conv, headdim=headdim, init_values=init_values
        )
        block.update(mlp=mlp, num_experts=num_experts, capacity_factor=capacity_factor)
        super().__init__(
            lambda _, rate: VimBlock(embed_dim, drop_path=rate, **block, **dd),
            *(img_size, patch_size, stride, in_chans, num_classes, global_pool, embed_dim, depth),
            *(drop_rate, drop_path_rate, dynamic_img_size),
            **dd,
        )

    def filter_checkpoint(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """See `vmamba.models.vim.checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)

    def _prefers_ema(self) -> bool:
        return self.pretrained_cfg.get('architecture') in _EMA_VARIANTS


_EARLIER_NAMES = ((r'^embed\.(pos_embed|cls_token)$', r'\1'), (r'^embed\.', 'patch_embed.'))
_OFFICIAL_NAMES = (
    (r'^norm_f\.', 'norm.'),
    (r'^layers\.', 'blocks.'),
    (r'\.mixer\.gamma$', '.ls.gamma'),
    (r'\.(A|D)_b(_log)?$', r'.\1\2_b'),
    (r'\.(conv1d|x_proj|dt_proj)(_b)?\.(weight|bias)$', r'.\1_\3\2'),
)
_DIRECTIONAL = r'\.mixer\.(conv1d_weight|conv1d_bias|x_proj_weight|dt_proj_weight|dt_proj_bias|A_log|D)(_b)?$'


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Renames any known layout to this module's and resizes the position embedding to the model's image size.

    The official layout has separate parameters for the two directions, the backward ones with suffix `_b`. Its
    `mixer.gamma` scales the mixer's output; for a model without layer scale it is multiplied into out_proj. From a
    detector, a segmentor or their backbone only the model is used; it has no final norm, which is re-initialised.

    Args:
        state_dict: Weights of this library (any version), the official code, a detector, a segmentor or a backbone.
        model: Vim model.

    Returns:
        Weights with the model's names.

    Raises:
        RuntimeError: If the grid of a position embedding cannot be determined.
    """
    out, output_norms = split_backbone(state_dict)
    official = any(key.startswith('layers.') for key in out)
    out = {rename_earlier(key): value for key, value in out.items()}
    if official:
        out = _stack_directions({rename(key, _OFFICIAL_NAMES): value for key, value in out.items()})
    if output_norms:
        out = with_fresh_norm(out, model)
    out = _fold_layer_scale(out, model.state_dict())
    return fit_pos_embed(out, model, official)


def rename_earlier(key: str) -> str:
    """Current name of a parameter that an earlier version of this library called `key`."""
    return rename(key, _EARLIER_NAMES)


def _stack_directions(state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Stacks each directional parameter with its `_b` partner.

    A parameter without partner is dropped and reported later as missing. A pair whose shapes differ, or of which only
    one is floating-point, passes unchanged and is reported later as not fitting.
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


def _fold_layer_scale(state_dict: Dict[str, Tensor], own: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Multiplies layer scales `ls.gamma` into out_proj if the model has none; keys that do not fit stay."""
    out = dict(state_dict)
    for key in [key for key in out if key.endswith('.ls.gamma') and key not in own]:
        name = key.replace('.ls.gamma', '.mixer.out_proj.weight')
        weight = out.get(name)
        if weight is None or not weight.is_floating_point() or not out[key].is_floating_point():
            continue
        if weight.shape[:1] == out[key].shape:
            out[name] = weight * out.pop(key).unsqueeze(-1)
    return out


def _cfg(hf_hub_id: str = '', file: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        **({'hf_hub_id': hf_hub_id, 'hf_hub_filename': file} if hf_hub_id else {}),
        'custom_load': 'hf',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': None,
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'fixed_input_size': True,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2401.09417',
        'origin_url': 'https://github.com/hustvl/Vim',
        **kwargs,
    }


_MAMBA2_PAPERS = 'arXiv:2401.09417', 'arXiv:2405.21060'
default_cfgs = generate_default_cfgs(
    {
        'vim_t.in1k': _cfg('hustvl/Vim-tiny-midclstok', 'vim_t_midclstok_76p1acc.pth'),
        'vim_t_stride8.in1k': _cfg('hustvl/Vim-tiny-midclstok', 'vim_t_midclstok_ft_78p3acc.pth'),
        'vim_s.in1k': _cfg('hustvl/Vim-small-midclstok', 'vim_s_midclstok_80p5acc.pth'),
        'vim_s_stride8.in1k': _cfg('hustvl/Vim-small-midclstok', 'vim_s_midclstok_ft_81p6acc.pth'),
        'vim_b.in1k': _cfg('hustvl/Vim-base-midclstok', 'vim_b_midclstok_81p9acc.pth'),
        'vim_nano.untrained': _cfg(input_size=(3, 32, 32), crop_pct=1.0),
        'vim_nano_moe.untrained': _cfg(input_size=(3, 32, 32), crop_pct=1.0),
        'vim2_t.untrained': _cfg(paper_ids=_MAMBA2_PAPERS),
        'vim2_s.untrained': _cfg(paper_ids=_MAMBA2_PAPERS),
    }
)
_EMA_VARIANTS = ('vim_b',)  # its published accuracy is of the EMA weights


_NANO: Dict[str, Any] = dict(
    embed_dim=256, depth=4, expand=1.0, d_state=4, img_size=32, patch_size=8, stride=4, global_pool='avg'
)


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    return create(Vim, variant, pretrained, **kwargs)


@register_model
def vim_t(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-T"""
    args = dict(embed_dim=192)
    return _create_vim('vim_t', pretrained, **{**args, **kwargs})


@register_model
def vim_t_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-T with overlapping patches"""
    args = dict(embed_dim=192, stride=8)
    return _create_vim('vim_t_stride8', pretrained, **{**args, **kwargs})


@register_model
def vim_s(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S"""
    args = dict(embed_dim=384)
    return _create_vim('vim_s', pretrained, **{**args, **kwargs})


@register_model
def vim_s_stride8(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S with overlapping patches"""
    args = dict(embed_dim=384, stride=8)
    return _create_vim('vim_s_stride8', pretrained, **{**args, **kwargs})


@register_model
def vim_b(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B"""
    args = dict(embed_dim=768)
    return _create_vim('vim_b', pretrained, **{**args, **kwargs})


@register_model
def vim_nano(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A small Vim for small images, light enough to train on a CPU; no weights are published"""
    return _create_vim('vim_nano', pretrained, **{**_NANO, **kwargs})


@register_model
def vim_nano_moe(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-nano with experts after each mixer; no weights are published"""
    args = dict(mlp='moe', num_experts=4, **_NANO)
    return _create_vim('vim_nano_moe', pretrained, **{**args, **kwargs})


@register_model
def vim2_t(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-T on the scan of Mamba-2; no weights are published"""
    args = dict(embed_dim=192, mixer='mamba2')
    return _create_vim('vim2_t', pretrained, **{**args, **kwargs})


@register_model
def vim2_s(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S on the scan of Mamba-2; no weights are published"""
    args = dict(embed_dim=384, mixer='mamba2')
    return _create_vim('vim2_s', pretrained, **{**args, **kwargs})


_LONG_NAME = 'vim_{}_224_bimambav2_final_pool_mean_abs_pos_embed_with_{}_div2'.format
register_model_deprecations(
    __name__,
    {
        _LONG_NAME('tiny_patch16', 'midclstok'): 'vim_t',
        _LONG_NAME('tiny_patch16_stride8', 'midclstok'): 'vim_t_stride8',
        _LONG_NAME('small_patch16', 'midclstok'): 'vim_s',
        _LONG_NAME('small_patch16_stride8', 'midclstok'): 'vim_s_stride8',
        _LONG_NAME('base_patch16', 'midclstok'): 'vim_b',
        _LONG_NAME('base_patch16', 'middle_cls_token'): 'vim_b',
    },
)
