"""MambaVision

Paper: `MambaVision: A Hybrid Mamba-Transformer Vision Backbone` - https://arxiv.org/abs/2407.08083

Official models: https://github.com/NVlabs/MambaVision. Their weights are licensed CC-BY-NC-SA-4.0, for non-commercial
use. This code was written from scratch.
"""

import re
from typing import Any, Dict, List, Optional, Sequence, Tuple, Union

import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, BatchNormAct2d, DropPath, LayerScale, Mlp, calculate_drop_path_rates
from timm.models import (
    generate_default_cfgs,
    register_model,
    register_model_deprecations,
    register_notrace_function,
)
from torch import Tensor, nn

from ..layers import (
    ConvNorm,
    ImageConv2d,
    LayerNorm,
    MambaVisionMixer,
    check_images,
    conv_norms,
    residual_branches,
)
from ..layers.norm import widen
from ..layers.options import check_counts, scaled_channels
from ._hierarchical import HierarchicalModel, Stage, check_heads, check_stages
from ._pretrained import build_model, rename, split_backbone, with_fresh_norm

__all__ = ['MambaVision']

NORM_EPS = 1e-5
STEM_EPS = 1e-4
CONV_STAGES = 2


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with BatchNorm and ReLU: [B, C, H, W] -> [B, d, H/4, W/4]."""

    def __init__(self, in_chans: int, hidden_dim: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.conv1 = ImageConv2d(in_chans, hidden_dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm1 = BatchNormAct2d(hidden_dim, eps=STEM_EPS, **dd)
        self.conv2 = nn.Conv2d(hidden_dim, dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm2 = BatchNormAct2d(dim, eps=STEM_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, 1)
        return conv_norms(x, ConvNorm(self.conv1, self.norm1), ConvNorm(self.conv2, self.norm2))


class Downsample(nn.Module):
    """3x3 convolution of stride 2, without norm: [B, d, H, W] -> [B, d', H/2, W/2]."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class ConvBlock(nn.Module):
    """x = x + drop_path(BN(conv(gelu(BN(conv(x)))))), with 3x3 convolutions and the tanh form of GELU."""

    def __init__(self, dim: int, drop_path: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv1 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm1 = nn.BatchNorm2d(dim, eps=NORM_EPS, **dd)
        self.act = nn.GELU(approximate='tanh')
        self.conv2 = nn.Conv2d(dim, dim, 3, padding=1, **dd)
        self.norm2 = nn.BatchNorm2d(dim, eps=NORM_EPS, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, H, W] -> [B, d, H, W]"""
        first = ConvNorm(self.conv1, self.norm1, self.act)
        return conv_norms(x, first, ConvNorm(self.conv2, self.norm2, drop_path=self.drop_path), residual=True)


class TokenBlock(nn.Module):
    """x = x + drop_path(g1 * mixer(norm1(x))), then x = x + drop_path(g2 * mlp(norm2(x))).

    Args:
        dim: Token channels d.
        mixer: [B, L, d] -> [B, L, d]
        mlp_ratio: Ratio of the MLP's hidden channels to d.
        init_values: Initial value of the layer scales g1 and g2; None for no layer scale.
        drop_path: Stochastic depth rate.
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        mlp_ratio: float = 4.0,
        init_values: Optional[float] = None,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = LayerNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        self.mixer = mixer
        self.ls1 = LayerScale(dim, init_values, **dd) if init_values is not None else None
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = LayerNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        self.mlp = Mlp(dim, scaled_channels(dim, mlp_ratio=mlp_ratio), **dd)
        self.ls2 = LayerScale(dim, init_values, **dd) if init_values is not None else None
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, d] -> [B, L, d]"""
        if self.ls1 is None or self.ls2 is None:
            return residual_branches(
                x, (self.norm1, self.mixer, self.drop_path1), (self.norm2, self.mlp, self.drop_path2)
            )
        x = x + self.drop_path1(self.ls1(self.mixer(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ConvStage(Stage):
    """Optional downsampling, then convolutional blocks: [B, d, H, W] -> [B, d', H', W']."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for run in self._block_calls():
            x = run(x)
        return x


class WindowStage(Stage):
    """Downsampling, then blocks on the tokens of each window: [B, d, H, W] -> [B, d', H/2, W/2].

    The map is zero-padded once to whole windows. The padding's tokens take part in all blocks and are then cut off.
    """

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module], window_size: int) -> None:
        super().__init__(downsample, blocks)
        self.window_size = window_size

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        dtype, shape = x.dtype, x.shape
        x = to_windows(widen(x.permute(0, 2, 3, 1)), self.window_size)  # [B, d, H, W] -> [B * n, w * w, d]
        for run in self._block_calls():
            x = run(x)
        x = from_windows(x, self.window_size, shape)
        return x.to(dtype).permute(0, 3, 1, 2)  # [B, H, W, d] -> [B, d, H, W]


@register_notrace_function
def to_windows(x: Tensor, side: int) -> Tensor:
    """Zero-pads a map on the right and bottom and cuts it: [B, H, W, d] -> [B * windows, side * side, d]

    The windows of an image follow each other row by row, and so do the tokens of a window.
    """
    height, width = x.shape[1:3]
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    x = x.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # [B, rows, side, columns, side, d]
    return x.transpose(2, 3).flatten(0, 2).flatten(1, 2)


@register_notrace_function
def from_windows(windows: Tensor, side: int, shape: Sequence[int]) -> Tensor:
    """Inverse of `to_windows` for a map of shape [B, d', H, W]: [B * windows, side * side, d] -> [B, H, W, d]"""
    batch, _, height, width = shape
    rows, columns = -(-height // side), -(-width // side)
    x = windows.reshape(batch, rows, columns, side, side, windows.shape[-1]).transpose(2, 3)
    x = x.reshape(batch, rows * side, columns * side, windows.shape[-1])
    return x[:, :height, :width]


class MambaVision(HierarchicalModel):
    """MambaVision backbone and classifier: two stages of convolutions, then stages of tokens in windows.

    Of a stage's blocks of tokens the first half (rounded up) mixes by `MambaVisionMixer`, the others by attention.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling of the last map; '' for none, so that the classifier returns a map of logits.
        depths: Blocks per stage.
        embed_dim: Channels of the first stage; each stage doubles them.
        stem_dim: Channels after the first convolution.
        num_heads: Attention heads of each stage of tokens.
        window_size: Side of the windows of each stage of tokens.
        d_state: State dimension N.
        mlp_ratio: Ratio of the MLPs' hidden channels to the stage's channels.
        init_values: Initial value of the layer scales in the stages of tokens; None for no layer scale.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; rates grow linearly from 0.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        depths: Tuple[int, ...] = (1, 3, 8, 4),
        embed_dim: int = 80,
        stem_dim: int = 32,
        num_heads: Union[int, Tuple[int, ...]] = (8, 16),
        window_size: Union[int, Tuple[int, ...]] = (14, 7),
        d_state: int = 8,
        mlp_ratio: float = 4.0,
        init_values: Optional[float] = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        check_stages(depths, in_chans, num_classes, drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_counts(embed_dim=embed_dim, stem_dim=stem_dim, d_state=d_state)
        heads = _per_stage(len(depths), num_heads=num_heads)
        windows = _per_stage(len(depths), window_size=window_size)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        stem = Stem(in_chans, stem_dim, embed_dim, **dd)
        stages: List[Stage] = []
        for i, dim in enumerate(dims):
            between = Downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            if i < CONV_STAGES:
                stages.append(ConvStage(between, [ConvBlock(dim, rate, **dd) for rate in drop_paths[i]]))
                continue
            blocks = []
            for j, rate in enumerate(drop_paths[i]):
                scans = j < -(-depths[i] // 2)
                mixer = MambaVisionMixer(dim, d_state, **dd) if scans else _attention(dim, heads[i], **dd)
                blocks.append(TokenBlock(dim, mixer, mlp_ratio, init_values, rate, **dd))
            stages.append(WindowStage(between, blocks, windows[i]))
        norm = nn.BatchNorm2d(dims[-1], eps=NORM_EPS, **dd)
        super().__init__(stem, stages, dims, norm, in_chans, num_classes, global_pool, drop_rate, **dd)

    def filter_checkpoint(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """See `vmamba.models.mambavision.checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


def _attention(dim: int, num_heads: int, device=None, dtype=None) -> Attention:
    check_heads(dim, num_heads)
    return Attention(dim, num_heads, qkv_bias=True, device=device, dtype=dtype)


def _per_stage(stages: int, **option: Union[int, Sequence[int]]) -> Dict[int, int]:
    """The values of the one option given by stage of tokens."""
    ((name, values),) = option.items()
    count = max(stages - CONV_STAGES, 0)
    given: List[Any] = list(values) if isinstance(values, (tuple, list)) else [values] * count
    if len(given) < count:
        raise ValueError(f'{name} must have a value for each of the {count} stages of tokens, got {values!r}')
    check_counts(**{f'{name}[{i}]': value for i, value in enumerate(given)})
    return dict(enumerate(given, CONV_STAGES))


_RENAMES = (
    (r'^encoder\.', ''),
    (r'^patch_embed\.conv_down\.0\.', 'stem.conv1.'),
    (r'^patch_embed\.conv_down\.1\.', 'stem.norm1.'),
    (r'^patch_embed\.conv_down\.3\.', 'stem.conv2.'),
    (r'^patch_embed\.conv_down\.4\.', 'stem.norm2.'),
    (r'^levels\.', 'stages.'),
    (r'\.gamma_([12])$', r'.ls\1.gamma'),
    (r'\.conv1d_([xz])\.weight$', r'.conv1d_\1_weight'),
    (r'\.dt_proj\.(weight|bias)$', r'.dt_proj_\1'),
    (r'^head\.(weight|bias)$', r'head.fc.\1'),
)


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Renames any known layout of MambaVision to this library's.

    Known are the layouts of this library (unchanged), of the official files, and of detectors and segmentors around a
    backbone, official or of this library. The latter have no final norm, which is re-initialised.

    Args:
        state_dict: Weights in a known layout.
        model: MambaVision model.

    Returns:
        Weights with the model's names.
    """
    state_dict, output_norms = split_backbone(state_dict)
    out = {}
    for key, value in state_dict.items():
        key = rename(key, _RENAMES)
        # Here a stage begins with its downsampling.
        key = re.sub(r'^stages\.(\d+)\.downsample\.reduction\.0\.', _next_stage, key)
        squeezed = re.search(r'\.conv1d_[xz]_weight$', key) and value.ndim == 3 and value.shape[1] == 1
        out[key] = value.squeeze(1) if squeezed else value
    return with_fresh_norm(out, model) if output_norms else out


def _next_stage(match: 're.Match[str]') -> str:
    return f'stages.{int(match[1]) + 1}.downsample.conv.'


def _cfg(hf_hub_id: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        **({'hf_hub_id': f'nvidia/{hf_hub_id}', 'hf_hub_filename': 'model.safetensors'} if hf_hub_id else {}),
        'custom_load': 'hf',
        'num_classes': 1000,
        'input_size': (3, 224, 224),
        'pool_size': (7, 7),
        'crop_pct': 1.0,
        'interpolation': 'bicubic',
        'mean': IMAGENET_DEFAULT_MEAN,
        'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'stem.conv1',
        'classifier': 'head.fc',
        'license': 'cc-by-nc-sa-4.0',
        'paper_ids': 'arXiv:2407.08083',
        'origin_url': 'https://github.com/NVlabs/MambaVision',
        **kwargs,
    }


_AT_256 = dict(input_size=(3, 256, 256), pool_size=(8, 8))
_AT_512 = dict(input_size=(3, 512, 512), pool_size=(16, 16), crop_pct=0.93, crop_mode='squash')

default_cfgs = generate_default_cfgs(
    {
        'mambavision_t.in1k': _cfg('MambaVision-T-1K'),
        'mambavision_t2.in1k': _cfg('MambaVision-T2-1K', crop_pct=0.98),
        'mambavision_s.in1k': _cfg('MambaVision-S-1K', crop_pct=0.93),
        'mambavision_b.in1k': _cfg('MambaVision-B-1K'),
        'mambavision_b.in21k_ft_in1k': _cfg('MambaVision-B-21K'),
        'mambavision_l.in1k': _cfg('MambaVision-L-1K'),
        'mambavision_l.in21k_ft_in1k': _cfg('MambaVision-L-21K'),
        'mambavision_l2.in1k': _cfg('MambaVision-L2-1K'),
        'mambavision_l2.in21k_ft_in1k_512': _cfg('MambaVision-L2-512-21K', **_AT_512),
        'mambavision_l3.in21k_ft_in1k_256': _cfg('MambaVision-L3-256-21K', **_AT_256),
        'mambavision_l3.in21k_ft_in1k_512': _cfg('MambaVision-L3-512-21K', **_AT_512),
        'mambavision_nano.untrained': _cfg(input_size=(3, 32, 32), pool_size=(1, 1), license='mit'),
    }
)


def _create_mambavision(variant: str, pretrained: bool = False, **kwargs: Any) -> MambaVision:
    windows = kwargs.setdefault('window_size', _windows_of(variant, kwargs.get('pretrained_cfg')))
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    model = build_model(MambaVision, variant, pretrained, feature_cfg, **kwargs)
    model._model_args = dict(window_size=windows)  # timm saves these, for readers that do not know the tag
    return model


def _windows_of(variant: str, pretrained_cfg: Any) -> Tuple[int, int]:
    """Windows that a tag's weights were trained with: the whole maps of stages 3 and 4 at the tag's image size."""
    known = default_cfgs[variant]
    if isinstance(pretrained_cfg, dict):
        pretrained_cfg = pretrained_cfg.get('tag')
    tag = pretrained_cfg if isinstance(pretrained_cfg, str) else getattr(pretrained_cfg, 'tag', None)
    side = known.cfgs.get(tag, known.default).input_size[-1]
    return side // 16, side // 32


@register_model
def mambavision_t(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T"""
    args = dict(depths=(1, 3, 8, 4), embed_dim=80, stem_dim=32, num_heads=(8, 16))
    return _create_mambavision('mambavision_t', pretrained, **{**args, **kwargs})


@register_model
def mambavision_t2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-T2"""
    args = dict(depths=(1, 3, 11, 4), embed_dim=80, stem_dim=32, num_heads=(8, 16))
    return _create_mambavision('mambavision_t2', pretrained, **{**args, **kwargs})


@register_model
def mambavision_s(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-S"""
    args = dict(depths=(3, 3, 7, 5), embed_dim=96, stem_dim=64, num_heads=(8, 16))
    return _create_mambavision('mambavision_s', pretrained, **{**args, **kwargs})


@register_model
def mambavision_b(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-B"""
    args = dict(depths=(3, 3, 10, 5), embed_dim=128, stem_dim=64, num_heads=(8, 16), init_values=1e-5)
    return _create_mambavision('mambavision_b', pretrained, **{**args, **kwargs})


@register_model
def mambavision_l(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L"""
    args = dict(depths=(3, 3, 10, 5), embed_dim=196, stem_dim=64, num_heads=(16, 32), init_values=1e-5)
    return _create_mambavision('mambavision_l', pretrained, **{**args, **kwargs})


@register_model
def mambavision_l2(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L2"""
    args = dict(depths=(3, 3, 12, 5), embed_dim=196, stem_dim=64, num_heads=(16, 32), init_values=1e-5)
    return _create_mambavision('mambavision_l2', pretrained, **{**args, **kwargs})


@register_model
def mambavision_l3(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """MambaVision-L3, for 256x256 images by default"""
    args = dict(depths=(3, 3, 20, 10), embed_dim=256, stem_dim=64, num_heads=(16, 32), init_values=1e-5)
    return _create_mambavision('mambavision_l3', pretrained, **{**args, **kwargs})


@register_model
def mambavision_nano(pretrained: bool = False, **kwargs: Any) -> MambaVision:
    """A small MambaVision for small images; no weights are published"""
    args = dict(depths=(1, 1, 2, 2), embed_dim=32, stem_dim=16, num_heads=(4, 8))
    return _create_mambavision('mambavision_nano', pretrained, **{**args, **kwargs})


register_model_deprecations(
    __name__,
    {
        'mamba_vision_T': 'mambavision_t',
        'mamba_vision_T2': 'mambavision_t2',
        'mamba_vision_S': 'mambavision_s',
        'mamba_vision_B': 'mambavision_b',
        'mamba_vision_B_21k': 'mambavision_b.in21k_ft_in1k',
        'mamba_vision_L': 'mambavision_l',
        'mamba_vision_L_21k': 'mambavision_l.in21k_ft_in1k',
        'mamba_vision_L2': 'mambavision_l2',
        'mamba_vision_L2_512_21k': 'mambavision_l2.in21k_ft_in1k_512',
        'mamba_vision_L3_256_21k': 'mambavision_l3.in21k_ft_in1k_256',
        'mamba_vision_L3_512_21k': 'mambavision_l3.in21k_ft_in1k_512',
    },
)
