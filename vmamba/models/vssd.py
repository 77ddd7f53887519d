"""VSSD

Paper: `VSSD: Vision Mamba with Non-Causal State Space Duality` - https://arxiv.org/abs/2407.18559

Official models and weights: https://github.com/YuHengsss/VSSD, without a licence. This code was written from scratch.
"""

import re
from typing import Any, Dict, Tuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, BatchNormAct2d, DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from torch import Tensor, nn

from ..layers import (
    ConvNorm,
    DepthwiseConv2d,
    ImageConv2d,
    LayerNorm,
    LayerNorm2d,
    NonCausalSSD,
    check_images,
    conv_norms,
    residual_branches,
)
from ..layers.options import check_counts, scaled_channels
from ._hierarchical import HierarchicalModel, Stage, check_heads, check_stages, split_norms
from ._pretrained import build_model, rename

__all__ = ['VSSD']

NORM_EPS = 1e-5
ATTENTION_STAGE = 3


class Stem(nn.Module):
    """Five convolutions with BatchNorm, the second and third around a shortcut: [B, C, H, W] -> [B, d, H/4, W/4]."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        half, wide = dim // 2, 4 * dim
        self.in_chans = in_chans
        self.conv1 = ImageConv2d(in_chans, half, 3, stride=2, padding=1, bias=False, **dd)
        self.norm1 = BatchNormAct2d(half, eps=NORM_EPS, **dd)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False, **dd)
        self.norm2 = BatchNormAct2d(half, eps=NORM_EPS, **dd)
        self.conv3 = nn.Conv2d(half, half, 3, padding=1, bias=False, **dd)
        self.norm3 = nn.BatchNorm2d(half, eps=NORM_EPS, **dd)
        self.conv4 = nn.Conv2d(half, wide, 3, stride=2, padding=1, bias=False, **dd)
        self.norm4 = BatchNormAct2d(wide, eps=NORM_EPS, **dd)
        self.conv5 = nn.Conv2d(wide, dim, 1, bias=False, **dd)
        self.norm5 = nn.BatchNorm2d(dim, eps=NORM_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, 1)
        x = conv_norms(x, ConvNorm(self.conv1, self.norm1))
        x = conv_norms(x, ConvNorm(self.conv2, self.norm2), ConvNorm(self.conv3, self.norm3), residual=True)
        return conv_norms(x, ConvNorm(self.conv4, self.norm4), ConvNorm(self.conv5, self.norm5))


class Downsample(nn.Module):
    """Wide 1x1, depthwise 3x3 of stride 2, and 1x1 convolution with BatchNorm: [B, d, H, W] -> [B, d', H/2, W/2]."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        wide = 4 * out_dim
        self.conv1 = nn.Conv2d(dim, wide, 1, **dd)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(wide, wide, 3, stride=2, padding=1, groups=wide, **dd)
        self.conv3 = nn.Conv2d(wide, out_dim, 1, **dd)
        self.norm = nn.BatchNorm2d(out_dim, eps=NORM_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        first, second = (ConvNorm(conv, act=self.act) for conv in (self.conv1, self.conv2))
        return conv_norms(x, first, second, ConvNorm(self.conv3, self.norm))


class MapAttention(Attention):
    """Softmax attention among all pixels of a channels-last map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, d] -> [B, H, W, d]"""
        return super().forward(x.flatten(1, 2)).view(x.shape)


class VSSDBlock(nn.Module):
    """x = cpe1(x), x = x + drop_path(mixer(norm1(x))), x = cpe2(x), x = x + drop_path(mlp(norm2(x))).

    The positional encodings add a depthwise convolution: cpe(x) = x + conv(x).

    Args:
        dim: Channels d.
        mixer: [B, H, W, d] -> [B, H, W, d]
        mlp_ratio: Ratio of the MLP's hidden channels to d.
        drop_path: Stochastic depth rate.
    """

    def __init__(
        self, dim: int, mixer: nn.Module, mlp_ratio: float = 4.0, drop_path: float = 0.0, device=None, dtype=None
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.cpe1 = DepthwiseConv2d(dim, residual=True, **dd)
        self.norm1 = LayerNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        self.mixer = mixer
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.cpe2 = DepthwiseConv2d(dim, residual=True, **dd)
        self.norm2 = LayerNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        self.mlp = Mlp(dim, scaled_channels(dim, mlp_ratio=mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, d] -> [B, H, W, d]"""
        x = self.cpe1(x)
        x = x + self.drop_path1(self.mixer(self.norm1(x)))
        x = self.cpe2(x)
        return residual_branches(x, (self.norm2, self.mlp, self.drop_path2))


class VSSD(HierarchicalModel):
    """VSSD backbone and classifier. The fourth stage mixes by attention, the others by `NonCausalSSD`.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling of the last map; '' for none, so that the classifier returns a map of logits.
        depths: Blocks per stage.
        embed_dim: Channels of the first stage; each stage doubles them.
        num_heads: Heads of each stage.
        expand: Ratio of the SSD's inner channels to the stage's channels.
        d_state: State dimension N.
        mlp_ratio: Ratio of the MLPs' hidden channels to the stage's channels.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; rates grow linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        depths: Tuple[int, ...] = (2, 4, 8, 4),
        embed_dim: int = 64,
        num_heads: Tuple[int, ...] = (2, 4, 8, 16),
        expand: float = 2.0,
        d_state: int = 64,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        check_stages(depths, in_chans, num_classes, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_counts(2, embed_dim=embed_dim)  # the stem starts with embed_dim // 2 channels
        if not isinstance(num_heads, (tuple, list)) or len(num_heads) < len(depths):
            raise ValueError(f'num_heads must have the heads of each of the {len(depths)} stages, got {num_heads!r}')
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        stem = Stem(in_chans, embed_dim, **dd)
        stages = []
        for i, dim in enumerate(dims):
            between = Downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            blocks = []
            for rate in drop_paths[i]:
                if i == ATTENTION_STAGE:
                    mixer = _attention(dim, num_heads[i], **dd)
                else:
                    mixer = NonCausalSSD(dim, num_heads[i], expand, d_state, norm_eps=NORM_EPS, **dd)
                blocks.append(VSSDBlock(dim, mixer, mlp_ratio, rate, **dd))
            stages.append(Stage(between, blocks, wide=False))  # convolutions and BatchNorm keep autocast's dtype
        norm = LayerNorm2d(dims[-1], eps=NORM_EPS, **dd)
        super().__init__(stem, stages, dims, norm, in_chans, num_classes, global_pool, drop_rate, **dd)

    def filter_checkpoint(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """See `vmamba.models.vssd.checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)

    def _prefers_ema(self) -> bool:
        return '_ema' in (self.pretrained_cfg.get('hf_hub_filename') or '')


def _attention(dim: int, num_heads: int, device=None, dtype=None) -> nn.Module:
    check_counts(num_heads=num_heads)
    check_heads(dim, num_heads)
    return MapAttention(dim, num_heads, device=device, dtype=dtype)


_RENAMES = (
    (r'^patch_embed\.conv1\.(conv|norm)\.', r'stem.\g<1>1.'),
    (r'^patch_embed\.conv2\.0\.(conv|norm)\.', r'stem.\g<1>2.'),
    (r'^patch_embed\.conv2\.1\.(conv|norm)\.', r'stem.\g<1>3.'),
    (r'^patch_embed\.conv3\.0\.(conv|norm)\.', r'stem.\g<1>4.'),
    (r'^patch_embed\.conv3\.1\.(conv|norm)\.', r'stem.\g<1>5.'),
    (r'^layers\.(\d+)\.blocks\.', r'stages.\1.blocks.'),
    (r'\.attn\.norm\.', '.mixer.out_norm.'),
    (r'\.attn\.to_qkv\.', '.mixer.qkv.'),
    (r'\.attn\.to_out\.', '.mixer.proj.'),
    (r'\.attn\.', '.mixer.'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
)
_DOWNSAMPLE = re.compile(r'^layers\.(\d+)\.downsample\.conv\.([012])\.(conv|norm)\.')


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Renames any known layout of VSSD to this library's.

    Known are the layouts of this library (unchanged), of the official files, and of backbones of detectors and
    segmentors, official or of this library. The `outnorm3` of a backbone becomes the final norm.

    Args:
        state_dict: Weights in a known layout.
        model: VSSD model.

    Returns:
        Weights with the model's names.
    """
    weights = split_norms(state_dict)
    return {rename(_DOWNSAMPLE.sub(_next_stage, key), _RENAMES): value for key, value in weights.items()}


def _next_stage(match: 're.Match[str]') -> str:
    """Here a stage begins with its downsampling, of which only the last convolution has a norm."""
    stage, number, kind = int(match[1]) + 1, int(match[2]) + 1, match[3]
    return f'stages.{stage}.downsample.norm.' if kind == 'norm' else f'stages.{stage}.downsample.conv{number}.'


def _cfg(file: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        **({'hf_hub_id': 'YuhengSSS/VSSD', 'hf_hub_filename': file} if file else {}),
        'custom_load': 'hf',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 0.875,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': 'head.fc',
        'license': 'none',
        'paper_ids': 'arXiv:2407.18559',
        'origin_url': 'https://github.com/YuHengsss/VSSD',
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        'vssd_micro.in1k': _cfg('vssd_micro_best.pth'),
        'vssd_t.in1k': _cfg('vssd_tiny_best_ema.pth'),
        'vssd_t.mesa_in1k': _cfg('vssd_tiny_e300_with_mesa.pth'),
        'vssd_s.in1k': _cfg('vssd_small_best_ema.pth'),
        'vssd_s.mesa_in1k': _cfg('vssd_small_e300_with_mesa.pth'),
        'vssd_b.in1k': _cfg('vssd_base_best_ema.pth'),
        'vssd_b.mesa_in1k': _cfg('vssd_base_e300_with_mesa.pth'),
        'vssd_nano.untrained': _cfg(input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0, license='mit'),
    }
)


def _create_vssd(variant: str, pretrained: bool = False, **kwargs: Any) -> VSSD:
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return build_model(VSSD, variant, pretrained, feature_cfg, **kwargs)


@register_model
def vssd_micro(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-Micro"""
    args = dict(depths=(2, 2, 8, 4), embed_dim=48, num_heads=(2, 4, 8, 16), d_state=48)
    return _create_vssd('vssd_micro', pretrained, **{**args, **kwargs})


@register_model
def vssd_t(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-T"""
    args = dict(depths=(2, 4, 8, 4), embed_dim=64, num_heads=(2, 4, 8, 16))
    return _create_vssd('vssd_t', pretrained, **{**args, **kwargs})


@register_model
def vssd_s(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-S"""
    args = dict(depths=(3, 4, 21, 5), embed_dim=64, num_heads=(2, 4, 8, 16))
    return _create_vssd('vssd_s', pretrained, **{**args, **kwargs})


@register_model
def vssd_b(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """VSSD-B"""
    args = dict(depths=(3, 4, 21, 5), embed_dim=96, num_heads=(3, 6, 12, 24))
    return _create_vssd('vssd_b', pretrained, **{**args, **kwargs})


@register_model
def vssd_nano(pretrained: bool = False, **kwargs: Any) -> VSSD:
    """A small VSSD for small images; no weights are published"""
    args = dict(depths=(1, 1, 2, 1), embed_dim=32, num_heads=(2, 4, 8, 8), d_state=16)
    return _create_vssd('vssd_nano', pretrained, **{**args, **kwargs})


register_model_deprecations(__name__, {'vssd_tiny': 'vssd_t', 'vssd_small': 'vssd_s', 'vssd_base': 'vssd_b'})
