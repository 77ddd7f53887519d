"""Vision Mamba (Vim)

Paper: `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model`
 - https://arxiv.org/abs/2401.09417

The models and weights are of https://github.com/hustvl/Vim (Apache-2.0); this code is written anew.
"""

import logging
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale, calculate_drop_path_rates, trunc_normal_
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import (
    AddRmsNorm,
    BiMamba,
    ResidualStream,
    TokenEmbed,
    split_class_token,
)
from ..layers.options import check_counts, check_indices, check_rates
from ..layers.residual import TensorOrStream, add_branch, adds, run_block, run_blocks, start_stream, total
from ._dense_layouts import split_backbone
from ._pretrained import build_model, load_pretrained, reset_parameters
from ._vim_layouts import convert_layout, fit_pos_embed, fold_layer_scale, is_official

try:
    from timm.models._input import update_model_input_size
except ImportError:  # older versions keep no account of a model's input size
    update_model_input_size = None

__all__ = ['Vim']

_logger = logging.getLogger(__name__)

NORM_EPS = 1e-5


class VimBlock(nn.Module):
    """x = x + drop_path(mixer(norm(x))), with the residual stream x in fp32.

    Of a ResidualStream the norm makes the sum, and what the block adds is left to the next norm.

    Args:
        dim: Token channels d.
        expand: Inner channels of the mixer over d.
        d_state: State dimension N.
        d_conv: Width of the causal convolutions.
        init_values: Initial value of a per-channel scale of the mixer's output; None for no scale.
        drop_path: Stochastic depth rate.
    """

    def __init__(
        self,
        dim: int,
        expand: float = 2.0,
        d_state: int = 16,
        d_conv: int = 4,
        init_values: Optional[float] = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm = AddRmsNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        self.mixer = BiMamba(dim, expand, d_state, d_conv=d_conv, **dd)
        self.ls = LayerScale(dim, init_values, **dd) if init_values is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: TensorOrStream) -> TensorOrStream:
        """[B, L, d] -> [B, L, d], or a ResidualStream to another"""
        return add_branch(x, self.norm, lambda normalised: self.ls(self.mixer(normalised)), self.drop_path)

    def norms(self) -> List[nn.Module]:
        """The norms that a ResidualStream meets."""
        return [self.norm]


class Vim(nn.Module):
    """Vision Mamba backbone and classifier.

    Args:
        img_size: Image size, or the size of the position embedding where `dynamic_img_size`.
        patch_size: Side of a patch.
        stride: Distance between patches, patch_size by default; smaller for overlapping patches, larger for gaps.
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: 'token' for the class token, 'avg' for the mean of the patch tokens, '' for all tokens.
        embed_dim: Token channels d.
        depth: Number of blocks.
        expand: Inner channels of the mixers over d.
        d_state: State dimension N.
        d_conv: Width of the causal convolutions.
        init_values: Initial value of the blocks' layer scale; None for none.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; it grows linearly from 0.
        dynamic_img_size: Accept any image size and resize the position embedding to it at each call.
    """

    output_fmt = 'NLC'

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
        d_state: int = 16,
        d_conv: int = 4,
        init_values: Optional[float] = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        stride = patch_size if stride is None else stride
        check_counts(depth=depth)
        check_counts(0, num_classes=num_classes)
        check_rates(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = _check_global_pool(global_pool)
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 0  # the class token is in the middle: a reader that cuts off the first would err
        self.grad_checkpointing = False
        self.embed = TokenEmbed(img_size, patch_size, stride, in_chans, embed_dim, dynamic_img_size, **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        block = dict(expand=expand, d_state=d_state, d_conv=d_conv, init_values=init_values)
        self.blocks = nn.Sequential(*(VimBlock(embed_dim, drop_path=rate, **block, **dd) for rate in drop_paths))
        self.feature_info = [dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=stride) for i in range(depth)]
        self.norm = AddRmsNorm(embed_dim, eps=NORM_EPS, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._init_head()
        self._init_out_proj()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Draws all weights anew: classifier from a truncated normal of 0.02, out_proj over sqrt(depth)."""
        reset_parameters(self)
        self._init_head()
        self._init_out_proj()

    def _init_out_proj(self) -> None:
        for block in self.blocks:
            bound = (block.mixer.out_proj.in_features * len(self.blocks)) ** -0.5
            nn.init.uniform_(block.mixer.out_proj.weight, -bound, bound)

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Loads a checkpoint in the official layout; see `vmamba.models.vim.checkpoint_filter_fn`."""
        use_ema = self.pretrained_cfg.get('architecture') in _EMA_VARIANTS
        load_pretrained(self, path, checkpoint_filter_fn, use_ema)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Embeddings, A_log, D, and the biases that have a row per direction."""
        exempt = ('pos_embed', 'cls_token', '.A_log', '.D', '.dt_proj_bias', '.conv1d_bias')
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns of the layer groups for layer-wise learning rates."""
        return dict(stem=r'^embed', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Replaces the classifier by a fresh one (0 classes for none), and the pooling if it is given."""
        check_counts(0, num_classes=num_classes)
        if global_pool is not None:
            self.global_pool = _check_global_pool(global_pool)
        self.num_classes = num_classes
        weight = self.norm.weight if hasattr(self.norm, 'weight') else self.embed.cls_token
        dd = {'device': weight.device, 'dtype': weight.dtype}
        head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head = head.train(self.training)
        self._init_head()

    def set_input_size(self, img_size: Optional[Union[int, Tuple[int, int]]] = None) -> None:
        """Changes the image size, if one is given, resizing the position embedding around its class token."""
        if img_size is not None:
            self.embed.set_input_size(img_size)
            if update_model_input_size is not None:
                update_model_input_size(self, self.embed.img_size)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: Optional[Union[int, List[int]]] = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Union[List[Any], Tuple[Tensor, List[Any]]]:
        """Outputs of the chosen blocks, without the class token.

        Args:
            x: Images [B, C, H, W].
            indices: The last n blocks if an int, all if None, else the blocks of these indices.
            return_prefix_tokens: Return pairs of an intermediate and its class token [B, 1, d].
            norm: Apply the final norm to every intermediate.
            stop_early: Stop after the last chosen block.
            output_fmt: 'NCHW' for maps [B, d, h, w], 'NLC' for tokens [B, h * w, d].
            intermediates_only: Return only the intermediates.

        Returns:
            The intermediates, or the final features (all tokens, normalised) and them.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        check_indices(indices=indices)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        intermediates, tokens = [], self.embed(x)
        size = tuple(x.shape[-2:])
        x = start_stream(tokens, self.blocks, VimBlock, self.grad_checkpointing)
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = run_block(block, x, self.grad_checkpointing)
            if i in take_indices:
                tokens = total(x)
                intermediates.append(split_class_token(self.norm(tokens) if norm else tokens))
                x = ResidualStream(tokens) if isinstance(x, ResidualStream) else tokens
        if output_fmt == 'NCHW':
            grid = self.embed.dynamic_feat_size(size)
            intermediates = [
                (tokens.transpose(1, 2).unflatten(-1, grid).contiguous(), cls) for tokens, cls in intermediates
            ]
        intermediates = [
            (tokens, cls.unsqueeze(1)) if return_prefix_tokens else tokens for tokens, cls in intermediates
        ]
        return intermediates if intermediates_only else (self._norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Removes what is not needed for the intermediates of these blocks; returns their indices."""
        check_indices(indices=indices)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        del self.blocks[max_index + 1 :]
        if prune_norm:
            self.norm = nn.Identity().train(self.training)
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def _norm(self, x: TensorOrStream) -> Tensor:
        if isinstance(x, ResidualStream) and adds(self.norm):
            return self.norm(x)[0]
        return self.norm(total(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> normalised tokens [B, h * w + 1, d], the class token in the middle"""
        return self._norm(run_blocks(self.blocks, self.embed(x), VimBlock, self.grad_checkpointing))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, L, d] -> logits [B, num_classes] ([B, L, num_classes] without pooling)"""
        if self.global_pool:
            patches, class_token = split_class_token(x)
            x = class_token if self.global_pool == 'token' else patches.mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]"""
        return self.forward_head(self.forward_features(x))


def _check_global_pool(global_pool: str) -> str:
    if global_pool not in ('', 'token', 'avg'):
        raise ValueError(f"global_pool must be 'token', 'avg' or '', got {global_pool!r}")
    return global_pool


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Renames the official layout to this module's and fits the position embedding to the model's image size.

    The official layout keeps the two directions' parameters apart, the backward one's marked `_b`. A `mixer.gamma`
    scales the mixer's output, so for a model without layer scale it goes into out_proj. Of a detector, a segmentor or
    their backbone only the model is taken, which has no final norm: it starts as a fresh one.
    """
    out, output_norms = split_backbone(state_dict)
    official = is_official(out)
    if official:
        out = convert_layout(out)
    own = model.state_dict()
    if output_norms and 'norm.weight' in own and 'norm.weight' not in out:
        _logger.warning('a checkpoint of dense prediction has no final norm: it starts freshly initialised')
        out['norm.weight'] = torch.ones_like(own['norm.weight'])
    out = fold_layer_scale(out, own)
    pos_embed = out.get('embed.pos_embed')
    if pos_embed is not None and pos_embed.ndim == 3 and pos_embed.shape[1] > 1:
        out['embed.pos_embed'] = fit_pos_embed(pos_embed, model, official)
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
        'first_conv': 'embed.proj',
        'classifier': 'head',
        'license': 'apache-2.0',
        'paper_ids': 'arXiv:2401.09417',
        'origin_url': 'https://github.com/hustvl/Vim',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'vim_t.in1k': _cfg('hustvl/Vim-tiny-midclstok', 'vim_t_midclstok_76p1acc.pth'),
        'vim_t_stride8.in1k': _cfg('hustvl/Vim-tiny-midclstok', 'vim_t_midclstok_ft_78p3acc.pth'),
        'vim_s.in1k': _cfg('hustvl/Vim-small-midclstok', 'vim_s_midclstok_80p5acc.pth'),
        'vim_s_stride8.in1k': _cfg('hustvl/Vim-small-midclstok', 'vim_s_midclstok_ft_81p6acc.pth'),
        'vim_b.in1k': _cfg('hustvl/Vim-base-midclstok', 'vim_b_midclstok_81p9acc.pth'),
        'vim_nano.untrained': _cfg(input_size=(3, 32, 32), crop_pct=1.0),
    }
)
_EMA_VARIANTS = ('vim_b',)  # its published accuracy is that of the averaged weights


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    feature_cfg = dict(out_indices=3, feature_cls='getter', flatten_sequential=True)
    return build_model(Vim, variant, pretrained, checkpoint_filter_fn, feature_cfg, **kwargs)


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
    patches = dict(img_size=32, patch_size=8, stride=4, global_pool='avg')
    args = dict(embed_dim=256, depth=4, expand=1.0, d_state=4, **patches)
    return _create_vim('vim_nano', pretrained, **{**args, **kwargs})


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
