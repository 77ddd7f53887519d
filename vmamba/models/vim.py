"""Vision Mamba (Vim)

Paper: `Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model`
 - https://arxiv.org/abs/2401.09417

Official models and weights: https://github.com/hustvl/Vim (Apache-2.0). This code was written from scratch.
"""

import logging
import math
import re
from typing import Any, Dict, List, Optional, Set, Tuple, Union

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerScale, calculate_drop_path_rates, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import (
    checkpoint,
    checkpoint_seq,
    generate_default_cfgs,
    get_pretrained_cfg_value,
    register_model,
    register_model_deprecations,
    register_notrace_module,
)
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..layers import BiMamba, RmsNorm, check_images, residual_branches
from ..layers.norm import widen
from ..layers.options import check_choice, check_counts, check_indices, check_rates
from ..layers.plain import has_global_hooks, is_plain
from ._pretrained import build_model, load_pretrained, reset_parameters, split_backbone

try:
    from timm.models._input import update_model_input_size
except ImportError:  # older timm does not record a model's input size
    update_model_input_size = None

__all__ = ['Vim']

_logger = logging.getLogger(__name__)

NORM_EPS = 1e-5


def split_class_token(tokens: Tensor) -> Tuple[Tensor, Tensor]:
    """Splits off the middle class token: [B, M + 1, d] -> patch tokens [B, M, d] and class token [B, d]."""
    middle = (tokens.shape[1] - 1) // 2
    patches = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
    return patches, tokens[:, middle]


def insert_class_token(patches: Tensor, class_token: Tensor) -> Tensor:
    """Inverse of `split_class_token`: [B, M, d] and [B, d] -> [B, M + 1, d]."""
    middle = patches.shape[1] // 2
    return torch.cat([patches[:, :middle], class_token.unsqueeze(1), patches[:, middle:]], dim=1)


def resize_pos_embed(pos_embed: Tensor, old_grid: Tuple[int, int], new_grid: Tuple[int, int]) -> Tensor:
    """Resizes a position embedding whose class token's entry is in the middle.

    Args:
        pos_embed: [1, h * w + 1, d] for the old grid.
        old_grid: (h, w) of the embedding.
        new_grid: (h, w) after resizing.

    Returns:
        [1, h * w + 1, d] for the new grid: the patches' entries resized bicubically, the class token's entry in the new
        middle.
    """
    # Resizing to the same grid is the identity, but with this shortcut an exported model would reject that grid.
    if not torch.compiler.is_exporting() and old_grid == new_grid:
        return pos_embed
    grid, class_token = split_class_token(pos_embed)
    grid = grid.unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, h * w, d] -> [1, d, h, w]
    resized = F.interpolate(grid.float(), size=new_grid, mode='bicubic', align_corners=False).to(grid.dtype)
    return insert_class_token(resized.flatten(2).transpose(1, 2), class_token)


@register_notrace_module
class PatchEmbed(nn.Module):
    """Embeds patches, which may overlap: [B, in_chans, H, W] -> [B, h * w, d].

    Patches that touch without overlap are embedded by a matrix product with the parameters of `proj`, unless `proj` has
    hooks, is parametrised or was replaced.

    Args:
        img_size: Image size.
        patch_size: Side of a patch.
        stride: Distance between patches; below patch_size they overlap, above it there are gaps.
        in_chans: Image channels.
        embed_dim: Token channels d.
        dynamic_img_size: Accept any image size that whole patches cover.
    """

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 16,
        stride: int = 16,
        in_chans: int = 3,
        embed_dim: int = 192,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_counts(patch_size=patch_size, stride=stride, in_chans=in_chans, embed_dim=embed_dim)
        self.img_size = to_2tuple(img_size)
        self.patch_size = patch_size
        self.stride = stride
        self.in_chans = in_chans
        self.dynamic_img_size = dynamic_img_size
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=stride, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        lecun_normal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def dynamic_feat_size(self, img_size: Tuple[int, int]) -> Tuple[int, int]:
        """Grid of patches (h, w) for an image size; raises ValueError if whole patches do not cover it."""
        for side in img_size:
            if side < self.patch_size or (side - self.patch_size) % self.stride:
                raise ValueError(
                    f'image size {img_size[0]}x{img_size[1]} is not covered by patches of {self.patch_size} with '
                    f'stride {self.stride}: each side must be {self.patch_size} plus a multiple of {self.stride}'
                )
        height, width = ((side - self.patch_size) // self.stride + 1 for side in img_size)
        return height, width

    def set_input_size(self, img_size: Union[int, Tuple[int, int]]) -> None:
        """Changes the image size."""
        size = to_2tuple(img_size)
        self.img_size, self.grid_size = size, self.dynamic_feat_size(size)

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.in_chans, 1)
        size = tuple(images.shape[-2:])
        if not self.dynamic_img_size and size != self.img_size:
            raise ValueError(
                f'the model takes {self.img_size[0]}x{self.img_size[1]} images, got {size[0]}x{size[1]}: create it '
                f'with img_size={size} or with dynamic_img_size=True'
            )
        height, width = self.dynamic_feat_size(size)
        if has_global_hooks() or not is_plain(self.proj, nn.Conv2d) or not self._is_tiling(self.proj):
            return self.proj(images).flatten(2).transpose(1, 2)  # [B, d, h, w] -> [B, h * w, d]
        # Patches without overlap are rows of a matrix; the product is faster than a convolution of 3 channels.
        batch, side = images.shape[0], self.patch_size
        x = images.reshape(batch, self.in_chans, height, side, width, side).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(batch, height * width, self.in_chans * side**2)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)

    def _is_tiling(self, conv: nn.Conv2d) -> bool:
        """Whether a convolution embeds non-overlapping patches of the model's size, with all channels of each."""
        side = self.patch_size, self.patch_size
        whole = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding == (0, 0)
        return whole and conv.kernel_size == conv.stride == side


class VimBlock(nn.Module):
    """x = x + drop_path(mixer(norm(x))), with the residual stream x in fp32.

    Args:
        dim: Token channels d.
        expand: Ratio of the mixer's inner channels to d.
        d_state: State dimension N.
        d_conv: Width of the causal convolutions.
        init_values: Initial value of the layer scale; None for no layer scale.
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
        self.norm = RmsNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        self.mixer = BiMamba(dim, expand, d_state, d_conv=d_conv, **dd)
        self.ls = LayerScale(dim, init_values, **dd) if init_values is not None else None
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]"""
        if self.ls is None:
            return residual_branches(x, (self.norm, self.mixer, self.drop_path))
        return x + self.drop_path(self.ls(self.mixer(self.norm(x))))


class Vim(nn.Module):
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
        expand: Ratio of the mixers' inner channels to d.
        d_state: State dimension N.
        d_conv: Width of the causal convolutions.
        init_values: Initial value of the layer scale; None for no layer scale.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; rates grow linearly from 0.
        dynamic_img_size: Accept any image size that whole patches cover; each call resizes the position embedding.
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
        self.num_prefix_tokens = 0  # the class token is in the middle, so slicing off first tokens would be wrong
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, stride, in_chans, embed_dim, dynamic_img_size, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.patch_embed.grid_size) + 1, embed_dim, **dd))
        drop_paths = calculate_drop_path_rates(drop_path_rate, depth)
        block: Dict[str, Any] = dict(expand=expand, d_state=d_state, d_conv=d_conv, init_values=init_values)
        self.blocks = nn.Sequential(*(VimBlock(embed_dim, drop_path=rate, **block, **dd) for rate in drop_paths))
        self.feature_info = [dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=stride) for i in range(depth)]
        self.norm = RmsNorm(embed_dim, eps=NORM_EPS, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._init_own()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Re-initialises all weights: class token, position embedding and classifier from a truncated normal of std
        0.02, out_proj scaled by 1 / sqrt(depth)."""
        reset_parameters(self)
        self._init_own()

    def _init_own(self) -> None:
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self._init_head()
        for block in self.blocks:
            bound = (block.mixer.out_proj.in_features * len(self.blocks)) ** -0.5
            nn.init.uniform_(block.mixer.out_proj.weight, -bound, bound)

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Loads a checkpoint in any known layout; see `vmamba.models.vim.checkpoint_filter_fn`."""
        use_ema = self.pretrained_cfg.get('architecture') in _EMA_VARIANTS
        load_pretrained(self, path, checkpoint_filter_fn, use_ema)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Embeddings, A_log, D, and the biases of the two directions."""
        exempt = ('pos_embed', 'cls_token', '.A_log', '.D', '.dt_proj_bias', '.conv1d_bias')
        return {name for name, _ in self.named_parameters() if name.endswith(exempt)}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Patterns of the layer groups for layer-wise learning-rate decay."""
        return dict(stem=r'^cls_token|pos_embed|patch_embed', blocks=[(r'^blocks\.(\d+)', None), (r'^norm', (99999,))])

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Sets whether to recompute each block's activations in the backward pass."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Optional[str] = None) -> None:
        """Re-initialises the classifier for num_classes (0 for none), and sets the pooling if given."""
        check_counts(0, num_classes=num_classes)
        if global_pool is not None:
            self.global_pool = _check_global_pool(global_pool)
        self.num_classes = num_classes
        dd = {'device': self.cls_token.device, 'dtype': self.cls_token.dtype}
        head = nn.Linear(self.embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self.head = head.train(self.training)
        self._init_head()

    def set_input_size(self, img_size: Optional[Union[int, Tuple[int, int]]] = None) -> None:
        """Changes the image size, if given, and resizes the position embedding."""
        if img_size is None:
            return
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        resized = resize_pos_embed(self.pos_embed.detach(), old_grid, self.patch_embed.grid_size)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)
        if update_model_input_size is not None:
            update_model_input_size(self, self.patch_embed.img_size)

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
            indices: Blocks to return: the last n for an int, all for None, else those with these indices.
            return_prefix_tokens: Return pairs of intermediate and class token [B, 1, d].
            norm: Apply the final norm to every intermediate.
            stop_early: Stop after the last chosen block.
            output_fmt: 'NCHW' for maps [B, d, h, w], 'NLC' for tokens [B, h * w, d].
            intermediates_only: Return only the intermediates, without the final features.

        Returns:
            The intermediates, or (final features, intermediates); final features are all tokens, normalised.
        """
        if output_fmt not in ('NCHW', 'NLC'):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        check_indices(indices=indices)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        images, intermediates = x, []
        x = self._embed(images)
        for i, block in enumerate(self.blocks[: max_index + 1] if stop_early else self.blocks):
            x = checkpoint(block, x) if self.grad_checkpointing and not torch.jit.is_scripting() else block(x)
            if i in take_indices:
                intermediates.append(split_class_token(self.norm(x) if norm else x))
        if output_fmt == 'NCHW':
            grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
            intermediates = [
                (tokens.transpose(1, 2).unflatten(-1, grid).contiguous(), cls) for tokens, cls in intermediates
            ]
        intermediates = [
            (tokens, cls.unsqueeze(1)) if return_prefix_tokens else tokens for tokens, cls in intermediates
        ]
        return intermediates if intermediates_only else (self.norm(x), intermediates)

    def prune_intermediate_layers(
        self, indices: Union[int, List[int]] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> List[int]:
        """Removes layers that the intermediates of these blocks do not need; returns the blocks' indices."""
        check_indices(indices=indices)
        take_indices, max_index = feature_take_indices(len(self.blocks), indices)
        del self.blocks[max_index + 1 :]
        if prune_norm:
            self.norm = nn.Identity().train(self.training)
        if prune_head:
            self.reset_classifier(0, '')
        return take_indices

    def _embed(self, images: Tensor) -> Tensor:
        """[B, C, H, W] -> tokens [B, h * w + 1, d] in at least fp32, the class token in the middle"""
        patches = self.patch_embed(images)
        tokens = insert_class_token(patches, self.cls_token.expand(patches.shape[0], -1, -1).squeeze(1))
        pos_embed = self.pos_embed
        if self.patch_embed.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
            pos_embed = resize_pos_embed(pos_embed, self.patch_embed.grid_size, grid)
        return widen(tokens + pos_embed)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> normalised tokens [B, h * w + 1, d], the class token in the middle"""
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

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
    check_choice(('token', 'avg', ''), global_pool=global_pool)
    return global_pool


_EARLIER_NAMES = ((r'^embed\.(pos_embed|cls_token)$', r'\1'), (r'^embed\.', 'patch_embed.'))
_OFFICIAL_NAMES = (
    (r'^norm_f\.', 'norm.'),
    (r'^layers\.', 'blocks.'),
    (r'\.mixer\.gamma$', '.ls.gamma'),
    (r'\.(A|D)_b(_log)?$', r'.\1\2_b'),
    (r'\.(conv1d|x_proj|dt_proj)(_b)?\.(weight|bias)$', r'.\1_\3\2'),
)
_STATE_SIZE = "give the checkpoint's image size: pretrained_cfg_overlay=dict(file=..., input_size=(3, height, width))"
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
        out = _stack_directions({_rename(key, _OFFICIAL_NAMES): value for key, value in out.items()})
    own = model.state_dict()
    if output_norms and 'norm.weight' in own and 'norm.weight' not in out:
        _logger.warning('a detection or segmentation checkpoint has no final norm: it is re-initialised')
        out['norm.weight'] = torch.ones_like(own['norm.weight'])
    out = _fold_layer_scale(out, own)
    pos_embed = out.get('pos_embed')
    if pos_embed is not None and pos_embed.ndim == 3 and pos_embed.shape[1] > 1:
        out['pos_embed'] = _fit_pos_embed(pos_embed, model, official)
    return out


def rename_earlier(key: str) -> str:
    """Current name of a parameter that an earlier version of this library called `key`."""
    return _rename(key, _EARLIER_NAMES)


def _rename(key: str, rules: Tuple[Tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


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


def _fit_pos_embed(pos_embed: Tensor, model: nn.Module, official: bool) -> Tensor:
    """Resizes a position embedding [1, h * w + 1, d] to the model's grid of patches.

    Its own grid comes from the checkpoint's image size. If that is unknown, official embeddings are assumed square.
    Others are assumed to have the model's grid if the number of patches matches, with a warning if that grid is not
    square.
    """
    patches, grid = pos_embed.shape[1] - 1, model.patch_embed.grid_size
    source = None if official else _stated_grid(model, patches)
    side = math.isqrt(patches)
    if source is None and patches == math.prod(grid) and not (official and side * side == patches):
        if not official and grid[0] != grid[1]:
            taken = 'the position embedding of %d patches is assumed to be %dx%d; if it has another grid, %s'
            _logger.warning(taken, patches, *grid, _STATE_SIZE)
        return pos_embed
    if source is None and side * side != patches:
        shape = tuple(pos_embed.shape)
        raise RuntimeError(f'pos_embed {shape} does not fit a square image: {_STATE_SIZE}')
    stated, source = source is not None, source or (side, side)
    if source != grid:
        doubt = '' if stated else _doubt_about_stride(model.patch_embed, source)
        _logger.warning('resizing the position embedding from %dx%d to %dx%d patches%s', *source, *grid, doubt)
    return resize_pos_embed(pos_embed, source, grid)


def _doubt_about_stride(embed: PatchEmbed, grid: Tuple[int, int]) -> str:
    """Warning text if another stride, without gaps, gives this grid at the model's image size; else empty."""
    for stride in range(1, embed.patch_size + 1):
        if all(n * stride == side - embed.patch_size + stride for n, side in zip(grid, embed.img_size)):
            return (
                f'; images of {embed.img_size[0]}x{embed.img_size[1]} have {grid[0]}x{grid[1]} patches at stride '
                f'{stride}, and the model has stride {embed.stride}: the checkpoint may be of another variant'
            )
    return ''


def _stated_grid(model: nn.Module, patches: int) -> Optional[Tuple[int, int]]:
    """Grid for the image size in the checkpoint's model arguments or in a changed pretrained configuration.

    None if there is no such size or its number of patches differs.
    """
    size = getattr(model, 'pretrained_model_args', {}).get('img_size')
    if size is None:
        cfg = getattr(model, 'pretrained_cfg', {})
        image = cfg.get('input_size')
        if image is None or image == get_pretrained_cfg_value(cfg['architecture'], 'input_size'):
            return None
        size = image[1:]
    try:
        grid = model.patch_embed.dynamic_feat_size(to_2tuple(size))
    except ValueError:
        return None
    return grid if math.prod(grid) == patches else None


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
_EMA_VARIANTS = ('vim_b',)  # its published accuracy is of the EMA weights


def _create_vim(variant: str, pretrained: bool = False, **kwargs: Any) -> Vim:
    feature_cls = kwargs.get('feature_cls', 'getter')
    if isinstance(feature_cls, str):  # module lists would skip class token and position embedding
        check_choice(('getter', 'hook', 'fx'), feature_cls=feature_cls)
    feature_cfg = dict(out_indices=3, feature_cls='getter')
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
