"""Adventurer

Paper: `Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency` - https://arxiv.org/abs/2410.07599

Official models and weights: https://github.com/wangf3014/Adventurer, without a licence. This code was written from
scratch.
"""

from numbers import Integral
from typing import Any, Dict, Optional, Tuple, Union

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, SwiGLU
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from ..layers import Mamba2, RmsNorm
from ..layers.options import scaled_channels
from ._isotropic import NORM_EPS, TokenModel, create, fit_pos_embed
from ._pretrained import rename, split_backbone, with_fresh_norm

__all__ = ['Adventurer']


class AdventurerBlock(nn.Module):
    """x = x + drop_path(mixer'(norm1(x))), then x = x + drop_path(mlp(norm2(x))), with a SwiGLU as MLP.

    mixer' is Mamba-2 over the mean of all tokens and then the tokens; the mean's output is dropped. If flipped, the
    patch tokens are in reverse order; the class token is last in either case.

    Args:
        dim: Token channels d.
        flip: Whether the mixer sees the patch tokens in reverse order.
        d_state: State dimension N.
        headdim: Channels P of a head.
        expand: Ratio of the mixer's inner channels to d.
        mlp_ratio: Ratio of the MLP's hidden channels to d.
        drop_path: Stochastic depth rate.
    """

    def __init__(
        self,
        dim: int,
        flip: bool = False,
        d_state: int = 64,
        headdim: int = 64,
        expand: float = 2.0,
        mlp_ratio: float = 2.5,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.flip = flip
        self.norm1 = RmsNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        self.mixer = Mamba2(dim, d_state, headdim=headdim, expand=expand, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = RmsNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        self.mlp = SwiGLU(dim, scaled_channels(dim, mlp_ratio=mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]"""
        x = x + self.drop_path1(self._mix(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _mix(self, h: Tensor) -> Tensor:
        if self.flip:
            h = flip_patches(h)
        h = self.mixer(torch.cat([h.mean(dim=1, keepdim=True), h], dim=1))[:, 1:]
        return flip_patches(h) if self.flip else h


def flip_patches(tokens: Tensor) -> Tensor:
    """Reverses all tokens [B, L, d] but the last one, the class token."""
    return torch.cat([tokens[:, :-1].flip(1), tokens[:, -1:]], dim=1)


class Adventurer(TokenModel):
    """Adventurer backbone and classifier: Mamba-2 over patches in one direction, the class token last.

    Args:
        img_size: Image size; with `dynamic_img_size`, the size of the position embedding.
        patch_size: Side of a patch.
        stride: Distance between patches, patch_size by default; smaller values overlap, larger ones leave gaps.
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: 'token' for the class token, 'avg' for the mean of the patch tokens, '' for all tokens.
        embed_dim: Token channels d.
        depth: Number of blocks.
        flipped_blocks: Indices of the blocks whose mixer sees the patches in reverse order. The released weights were
            trained with blocks 2 and 3; the paper describes flips between every two layers.
        d_state: State dimension N.
        headdim: Channels P of a head.
        expand: Ratio of the mixers' inner channels to d.
        mlp_ratio: Ratio of the MLPs' hidden channels to d.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; rates grow linearly from 0.
        dynamic_img_size: Accept any image size that whole patches cover; each call resizes the position embedding.
    """

    class_token_at = 'last'

    def __init__(
        self,
        img_size: Union[int, Tuple[int, int]] = 224,
        patch_size: int = 16,
        stride: Optional[int] = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'token',
        embed_dim: int = 256,
        depth: int = 12,
        flipped_blocks: Tuple[int, ...] = (2, 3),
        d_state: int = 64,
        headdim: int = 64,
        expand: float = 2.0,
        mlp_ratio: float = 2.5,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        if not isinstance(flipped_blocks, (tuple, list)) or not all(isinstance(i, Integral) for i in flipped_blocks):
            raise ValueError(f'flipped_blocks must be a tuple or list of indices of blocks, got {flipped_blocks!r}')
        options: Dict[str, Any] = dict(d_state=d_state, headdim=headdim, expand=expand, mlp_ratio=mlp_ratio)
        super().__init__(
            lambda i, rate: AdventurerBlock(embed_dim, i in flipped_blocks, drop_path=rate, **options, **dd),
            *(img_size, patch_size, stride, in_chans, num_classes, global_pool, embed_dim, depth),
            *(drop_rate, drop_path_rate, dynamic_img_size),
            **dd,
        )

    def filter_checkpoint(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """See `vmamba.models.adventurer.checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


_RENAMES = (
    (r'^norm_f\.', 'norm.'),
    (r'^layers\.(\d+)\.norm\.', r'blocks.\1.norm1.'),
    (r'^layers\.(\d+)\.norm_mlp\.', r'blocks.\1.norm2.'),
    (r'^layers\.', 'blocks.'),
    (r'\.mlp\.w1\.', '.mlp.fc1_g.'),
    (r'\.mlp\.w2\.', '.mlp.fc1_x.'),
    (r'\.mlp\.w3\.', '.mlp.fc2.'),
)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Renames any known layout to this module's and resizes the position embedding to the model's image size.

    From a detector, a segmentor or their backbone only the model is used; it has no final norm, which is
    re-initialised.

    Args:
        state_dict: Weights of this library, the official code, a detector, a segmentor or a backbone.
        model: Adventurer model.

    Returns:
        Weights with the model's names.

    Raises:
        RuntimeError: If the grid of a position embedding cannot be determined.
    """
    weights, output_norms = split_backbone(state_dict)
    official = any(key.startswith('layers.') for key in weights)
    out = {rename(key, _RENAMES): value for key, value in weights.items()}
    if output_norms:
        out = with_fresh_norm(out, model)
    return fit_pos_embed(out, model, official)


def _cfg(file: str = '', size: int = 224, **kwargs: Any) -> Dict[str, Any]:
    return {
        **({'hf_hub_id': 'Wangf3014/Adventurer', 'hf_hub_filename': file} if file else {}),
        'custom_load': 'hf',
        'num_classes': 1000,
        'input_size': (3, size, size),
        'pool_size': None,
        'crop_pct': 0.875 if size == 224 else 1.0,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'fixed_input_size': True,
        'first_conv': 'patch_embed.proj',
        'classifier': 'head',
        'license': 'none',
        'paper_ids': 'arXiv:2410.07599',
        'origin_url': 'https://github.com/wangf3014/Adventurer',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'adventurer_t.in1k': _cfg('adventurer_tiny_patch16_224.pth'),
        'adventurer_s.in1k': _cfg('adventurer_small_patch16_224.pth'),
        'adventurer_b.in1k': _cfg('adventurer_base_patch16_224.pth'),
        'adventurer_b.in1k_384': _cfg('adventurer_base_patch16_384.pth', 384),
        'adventurer_b.in1k_448': _cfg('adventurer_base_patch16_448.pth', 448),
        'adventurer_l.in1k': _cfg('adventurer_large_patch16_224.pth'),
        'adventurer_b_patch8.in1k': _cfg('adventurer_base_patch8_224.pth', crop_pct=1.0),
        'adventurer_b_patch8.in1k_448': _cfg('adventurer_base_patch8_448.pth', 448),
        'adventurer_nano.untrained': _cfg(size=32, license='mit'),
    }
)


def _create_adventurer(variant: str, pretrained: bool = False, **kwargs: Any) -> TokenModel:
    return create(Adventurer, variant, pretrained, **kwargs)


@register_model
def adventurer_t(pretrained: bool = False, **kwargs: Any) -> TokenModel:
    """Adventurer-T"""
    args = dict(embed_dim=256, depth=12)
    return _create_adventurer('adventurer_t', pretrained, **{**args, **kwargs})


@register_model
def adventurer_s(pretrained: bool = False, **kwargs: Any) -> TokenModel:
    """Adventurer-S"""
    args = dict(embed_dim=512, depth=12)
    return _create_adventurer('adventurer_s', pretrained, **{**args, **kwargs})


@register_model
def adventurer_b(pretrained: bool = False, **kwargs: Any) -> TokenModel:
    """Adventurer-B"""
    args = dict(embed_dim=768, depth=12)
    return _create_adventurer('adventurer_b', pretrained, **{**args, **kwargs})


@register_model
def adventurer_b_patch8(pretrained: bool = False, **kwargs: Any) -> TokenModel:
    """Adventurer-B with patches of 8x8 pixels"""
    args = dict(embed_dim=768, depth=12, patch_size=8)
    return _create_adventurer('adventurer_b_patch8', pretrained, **{**args, **kwargs})


@register_model
def adventurer_l(pretrained: bool = False, **kwargs: Any) -> TokenModel:
    """Adventurer-L"""
    args = dict(embed_dim=1024, depth=24)
    return _create_adventurer('adventurer_l', pretrained, **{**args, **kwargs})


@register_model
def adventurer_nano(pretrained: bool = False, **kwargs: Any) -> TokenModel:
    """A small Adventurer for small images, light enough to train on a CPU; no weights are published"""
    args = dict(img_size=32, patch_size=4, embed_dim=128, depth=4, d_state=16, headdim=32)
    return _create_adventurer('adventurer_nano', pretrained, **{**args, **kwargs})


register_model_deprecations(
    __name__,
    {
        'adventurer_tiny_patch16': 'adventurer_t',
        'adventurer_small_patch16': 'adventurer_s',
        'adventurer_base_patch16': 'adventurer_b',
        'adventurer_base_patch8': 'adventurer_b_patch8',
        'adventurer_large_patch16': 'adventurer_l',
    },
)
