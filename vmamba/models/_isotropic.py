"""What backbones of patch tokens have in common: embeddings, features, classifier, parameter groups."""

import logging
import math
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type, Union

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import checkpoint, checkpoint_seq, get_pretrained_cfg_value, register_notrace_module
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ..kernels import linear
from ..layers import RmsNorm, check_images
from ..layers.norm import widen
from ..layers.options import check_choice, check_counts, check_indices, check_rates
from ..layers.plain import has_global_hooks, is_plain
from ._pretrained import build_model, load_pretrained, reset_parameters

try:
    from timm.models._input import update_model_input_size
except ImportError:  # older timm does not record a model's input size
    update_model_input_size = None

_logger = logging.getLogger(__name__)

NORM_EPS = 1e-5
_STATE_SIZE = "give the checkpoint's image size: pretrained_cfg_overlay=dict(file=..., input_size=(3, height, width))"
_NO_DECAY = ('pos_embed', 'cls_token', '.A_log', '.D', '.dt_proj_bias', '.dt_bias', '.conv1d_bias')


def _class_index(patches: int, at: str) -> int:
    return patches // 2 if at == 'middle' else patches


def split_class_token(tokens: Tensor, at: str = 'middle') -> Tuple[Tensor, Tensor]:
    """Splits off the class token, which is in the middle or last.

    Args:
        tokens: [B, M + 1, d].
        at: 'middle' or 'last'.

    Returns:
        Patch tokens [B, M, d] and class token [B, d].
    """
    index = _class_index(tokens.shape[1] - 1, at)
    class_token = tokens[:, index : index + 1].squeeze(1)  # torch 2.7 exports an index of a symbolic size as a number
    if at == 'last':
        return tokens[:, :index], class_token
    return torch.cat([tokens[:, :index], tokens[:, index + 1 :]], dim=1), class_token


def insert_class_token(patches: Tensor, class_token: Tensor, at: str = 'middle') -> Tensor:
    """Inverse of `split_class_token`: [B, M, d] and [B, d] -> [B, M + 1, d]."""
    index = _class_index(patches.shape[1], at)
    return torch.cat([patches[:, :index], class_token.unsqueeze(1), patches[:, index:]], dim=1)


def resize_pos_embed(
    pos_embed: Tensor, old_grid: Tuple[int, int], new_grid: Tuple[int, int], at: str = 'middle'
) -> Tensor:
    """Resizes a position embedding that has an entry of the class token.

    Args:
        pos_embed: [1, h * w + 1, d] for the old grid.
        old_grid: (h, w) of the embedding.
        new_grid: (h, w) after resizing.
        at: Where the class token's entry is, 'middle' or 'last'.

    Returns:
        [1, h * w + 1, d] for the new grid: the patches' entries resized bicubically, the class token's entry put back
        in its place.
    """
    # Resizing to the same grid is the identity, but with this shortcut an exported model would reject that grid.
    if not torch.compiler.is_exporting() and old_grid == new_grid:
        return pos_embed
    grid, class_token = split_class_token(pos_embed, at)
    grid = grid.unflatten(1, old_grid).permute(0, 3, 1, 2)  # [1, h * w, d] -> [1, d, h, w]
    resized = F.interpolate(grid.float(), size=new_grid, mode='bicubic', align_corners=False).to(grid.dtype)
    return insert_class_token(resized.flatten(2).transpose(1, 2), class_token, at)


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
        return linear(x, self.proj.weight.flatten(1), self.proj.bias)

    def _is_tiling(self, conv: nn.Conv2d) -> bool:
        """Whether a convolution embeds non-overlapping patches of the model's size, with all channels of each."""
        side = self.patch_size, self.patch_size
        whole = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding == (0, 0)
        return whole and conv.kernel_size == conv.stride == side


class TokenModel(nn.Module):
    """Patches and a class token through blocks [B, L, d] -> [B, L, d], a norm and a classifier.

    A family defines `filter_checkpoint`, and builds blocks with a `mixer`.

    Args:
        make_block: Makes a block from its index and its stochastic depth rate.
        img_size: Image size; with `dynamic_img_size`, the size of the position embedding.
        patch_size: Side of a patch.
        stride: Distance between patches, patch_size by default; smaller values overlap, larger ones leave gaps.
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: 'token' for the class token, 'avg' for the mean of the patch tokens, '' for all tokens.
        embed_dim: Token channels d.
        depth: Number of blocks.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; rates grow linearly from 0.
        dynamic_img_size: Accept any image size that whole patches cover; each call resizes the position embedding.
    """

    output_fmt = 'NLC'
    class_token_at = 'middle'

    def __init__(
        self,
        make_block: Callable[[int, float], nn.Module],
        img_size: Union[int, Tuple[int, int]],
        patch_size: int,
        stride: Optional[int],
        in_chans: int,
        num_classes: int,
        global_pool: str,
        embed_dim: int,
        depth: int,
        drop_rate: float,
        drop_path_rate: float,
        dynamic_img_size: bool,
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
        self.num_prefix_tokens = 0  # the class token is not first, so slicing off first tokens would be wrong
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(img_size, patch_size, stride, in_chans, embed_dim, dynamic_img_size, **dd)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim, **dd))
        self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.patch_embed.grid_size) + 1, embed_dim, **dd))
        self.blocks = nn.Sequential(*map(make_block, range(depth), calculate_drop_path_rates(drop_path_rate, depth)))
        self.feature_info = [dict(module=f'blocks.{i}', num_chs=embed_dim, reduction=stride) for i in range(depth)]
        self.norm = RmsNorm(embed_dim, eps=NORM_EPS, **dd)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **dd) if num_classes > 0 else nn.Identity()
        self._init_own()

    def filter_checkpoint(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """Weights in any known layout with the model's names and shapes."""
        raise NotImplementedError

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Re-initialises all weights: class token, position embedding and classifier from a truncated normal of std
        0.02, the mixers' last projections scaled by 1 / sqrt(depth), biases of linear layers zero."""
        reset_parameters(self)
        self._init_own()

    def _init_own(self) -> None:
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self._init_head()
        for block in self.blocks:
            last = getattr(block.mixer, 'out_proj', None) or block.mixer.output_linear
            if isinstance(last, nn.Linear):  # in S4D a GLU follows
                bound = (last.in_features * len(self.blocks)) ** -0.5
                nn.init.uniform_(last.weight, -bound, bound)
            for module in block.modules():
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _init_head(self) -> None:
        if isinstance(self.head, nn.Linear):
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    @torch.jit.ignore
    def load_pretrained(self, path: str) -> None:
        """Loads a checkpoint in any known layout; see `filter_checkpoint`."""
        load_pretrained(self, path, use_ema=self._prefers_ema())

    def _prefers_ema(self) -> bool:
        """Whether the published accuracy is of a checkpoint's EMA weights."""
        return False

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Embeddings, A_log, D, the biases of step sizes and convolutions, and what mixers name themselves."""
        names = {name for name, _ in self.named_parameters() if name.endswith(_NO_DECAY)}
        for i, block in enumerate(self.blocks):
            if hasattr(block.mixer, 'no_weight_decay'):
                names |= {f'blocks.{i}.mixer.{name}' for name in block.mixer.no_weight_decay()}
        return names

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
        resized = resize_pos_embed(self.pos_embed.detach(), old_grid, self.patch_embed.grid_size, self.class_token_at)
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
                intermediates.append(split_class_token(self.norm(x) if norm else x, self.class_token_at))
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
        """[B, C, H, W] -> tokens [B, h * w + 1, d] in at least fp32, the class token among them"""
        patches = self.patch_embed(images)
        class_token = self.cls_token.expand(patches.shape[0], -1, -1).squeeze(1)
        tokens = insert_class_token(patches, class_token, self.class_token_at)
        pos_embed = self.pos_embed
        if self.patch_embed.dynamic_img_size:
            grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
            pos_embed = resize_pos_embed(pos_embed, self.patch_embed.grid_size, grid, self.class_token_at)
        return widen(tokens + pos_embed)

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> normalised tokens [B, h * w + 1, d], the class token among them"""
        x = self._embed(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens [B, L, d] -> logits [B, num_classes] ([B, L, num_classes] without pooling)"""
        if self.global_pool:
            patches, class_token = split_class_token(x, self.class_token_at)
            x = class_token if self.global_pool == 'token' else patches.mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]"""
        return self.forward_head(self.forward_features(x))


def _check_global_pool(global_pool: str) -> str:
    check_choice(('token', 'avg', ''), global_pool=global_pool)
    return global_pool


def fit_pos_embed(state_dict: Dict[str, Tensor], model: nn.Module, official: bool) -> Dict[str, Tensor]:
    """The weights with `pos_embed` in the model's grid; one that is no position embedding stays, to be reported."""
    pos_embed = state_dict.get('pos_embed')
    if pos_embed is None or pos_embed.ndim != 3 or pos_embed.shape[1] <= 1:
        return state_dict
    return {**state_dict, 'pos_embed': _in_grid_of(model, pos_embed, official)}


def _in_grid_of(model: nn.Module, pos_embed: Tensor, official: bool) -> Tensor:
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
    return resize_pos_embed(pos_embed, source, grid, model.class_token_at)


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


def create(model_cls: Type[TokenModel], variant: str, pretrained: bool = False, **kwargs: Any) -> TokenModel:
    """Builds a registered variant; see `build_model`."""
    feature_cls = kwargs.get('feature_cls', 'getter')
    if isinstance(feature_cls, str):  # module lists would skip class token and position embedding
        check_choice(('getter', 'hook', 'fx'), feature_cls=feature_cls)
    feature_cfg = dict(out_indices=3, feature_cls='getter')
    return build_model(model_cls, variant, pretrained, feature_cfg, **kwargs)
