"""VMamba

Paper: `VMamba: Visual State Space Model` - https://arxiv.org/abs/2401.10166

Official models and weights: https://github.com/MzeroMiko/VMamba (MIT). This code was written from scratch.
"""

import re
from functools import partial
from typing import Any, Callable, Dict, Optional, Tuple

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, Mlp, calculate_drop_path_rates
from timm.models import generate_default_cfgs, register_model, register_model_deprecations
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from ..layers import SS2D, SSD2D, ImageConv2d, LayerNorm, LayerNorm2d, SwitchMoE, check_images, residual_branches
from ..layers.options import check_choice, check_counts, scaled_channels
from ._hierarchical import HierarchicalModel, Stage, check_stages, split_norms
from ._pretrained import build_model, rename

__all__ = ['VMamba']

NORM_EPS = 1e-5


class ConvStem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with a LayerNorm: [B, C, H, W] -> [B, d, H/4, W/4]."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.conv1 = ImageConv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = LayerNorm2d(dim // 2, eps=NORM_EPS, autocast=True, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = LayerNorm2d(dim, eps=NORM_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, 1)
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class PatchStem(nn.Module):
    """One 4x4 patch convolution with a LayerNorm: [B, C, H, W] -> [B, d, H/4, W/4]."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.conv = ImageConv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = LayerNorm2d(dim, eps=NORM_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, 4)
        return self.norm(self.conv(x))


class ConvDownsample(nn.Module):
    """3x3 convolution of stride 2 with a LayerNorm: [B, d, H, W] -> [B, d', H/2, W/2]."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = LayerNorm2d(out_dim, eps=NORM_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class PatchDownsample(PatchMerging):
    """2x2 patches concatenated, normalised, projected: [B, d, H, W] -> [B, d', H/2, W/2]; odd sides are padded."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        norm = partial(LayerNorm, eps=NORM_EPS, autocast=True)
        super().__init__(dim, out_dim, norm_layer=norm, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1))  # [B, d, H, W] -> [B, H, W, d]
        return x.permute(0, 3, 1, 2)


_STEMS: Dict[str, Callable[..., nn.Module]] = {'conv': ConvStem, 'patch': PatchStem}
_DOWNSAMPLES: Dict[str, Callable[..., nn.Module]] = {'conv': ConvDownsample, 'patch': PatchDownsample}


class VMambaBlock(nn.Module):
    """x = x + drop_path(mixer(norm1(x))), then x = x + drop_path(mlp(norm2(x))) if there is an MLP.

    Args:
        dim: Channels d.
        ssm_ratio: Ratio of the mixer's inner channels to d.
        d_state: State dimension N.
        conv_bias: Whether SS2D's convolution has a bias.
        gate: Whether SS2D's output is gated.
        mlp_ratio: Ratio of the MLP's hidden channels to d; 0 for no MLP.
        drop_path: Stochastic depth rate.
        mixer: 'ss2d' for `SS2D`, 'ssd2d' for `SSD2D`.
        mlp: 'mlp' for one MLP, 'moe' for `SwitchMoE`.
        num_experts: Experts of `SwitchMoE`.
        capacity_factor: Of `SwitchMoE`.
    """

    def __init__(
        self,
        dim: int,
        ssm_ratio: float = 2.0,
        d_state: int = 1,
        conv_bias: bool = False,
        gate: bool = False,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        mixer: str = 'ss2d',
        mlp: str = 'mlp',
        num_experts: int = 8,
        capacity_factor: Optional[float] = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.norm1 = LayerNorm(dim, eps=NORM_EPS, autocast=True, **dd)
        if mixer == 'ssd2d':
            self.mixer: nn.Module = SSD2D(dim, ssm_ratio, d_state, norm_eps=NORM_EPS, **dd)
        else:
            self.mixer = SS2D(dim, ssm_ratio, d_state, conv_bias=conv_bias, gate=gate, norm_eps=NORM_EPS, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.has_mlp = mlp_ratio != 0
        if self.has_mlp:
            self.norm2 = LayerNorm(dim, eps=NORM_EPS, autocast=True, **dd)
            hidden = scaled_channels(dim, mlp_ratio=mlp_ratio)
            if mlp == 'moe':
                self.mlp: nn.Module = SwitchMoE(dim, num_experts, hidden, capacity_factor, **dd)
            else:
                self.mlp = Mlp(dim, hidden, **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, d] -> [B, H, W, d]"""
        branches = [(self.norm1, self.mixer, self.drop_path1)]
        if self.has_mlp:
            branches.append((self.norm2, self.mlp, self.drop_path2))
        return residual_branches(x, *branches)


class VMamba(HierarchicalModel):
    """VMamba backbone and classifier.

    Args:
        in_chans: Image channels.
        num_classes: Classes; 0 for no classifier.
        global_pool: Pooling of the last map; '' for none, so that the classifier returns a map of logits.
        depths: Blocks per stage.
        embed_dim: Channels of the first stage; each stage doubles them.
        ssm_ratio: Ratio of the mixers' inner channels to the stage's channels.
        d_state: State dimension N.
        conv_bias: Whether SS2D's convolutions have a bias.
        gate: Whether SS2D's outputs are gated.
        mlp_ratio: Ratio of the MLPs' hidden channels to the stage's channels; 0 for no MLPs.
        stem: 'conv' for two overlapping convolutions, 'patch' for one patch convolution.
        downsample: 'conv' for an overlapping convolution, 'patch' for patch merging.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Stochastic depth rate of the last block; rates grow linearly from 0.
        mixer: 'ss2d', or 'ssd2d' for the scan of Mamba-2, which has no gate and no bias of the convolution.
        mlp: 'mlp', or 'moe' for a mixture of experts, each as large as the MLP: see `SwitchMoE`. Training adds
            `auxiliary_loss(model)` to the loss.
        num_experts: Experts of 'moe'.
        capacity_factor: Capacity of an expert in training, relative to an equal share of the tokens; None for no limit.
    """

    self_initialised = ('x_proj',)

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = 'avg',
        depths: Tuple[int, ...] = (2, 2, 8, 2),
        embed_dim: int = 96,
        ssm_ratio: float = 1.0,
        d_state: int = 1,
        conv_bias: bool = False,
        gate: bool = False,
        mlp_ratio: float = 4.0,
        stem: str = 'conv',
        downsample: str = 'conv',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        mixer: str = 'ss2d',
        mlp: str = 'mlp',
        num_experts: int = 8,
        capacity_factor: Optional[float] = None,
        device=None,
        dtype=None,
    ) -> None:
        dd = {'device': device, 'dtype': dtype}
        rates = dict(drop_rate=drop_rate, drop_path_rate=drop_path_rate)
        check_stages(depths, in_chans, num_classes, **rates)
        check_counts(2, embed_dim=embed_dim)  # the convolutional stem starts with embed_dim // 2 channels
        check_choice(('ss2d', 'ssd2d'), mixer=mixer)
        if mixer == 'ssd2d' and (gate or conv_bias):
            raise ValueError(f"mixer='ssd2d' has no gate and no conv_bias, got gate={gate}, conv_bias={conv_bias}")
        check_choice(('mlp', 'moe'), mlp=mlp)
        if mlp == 'moe' and mlp_ratio == 0:
            raise ValueError(f"mlp='moe' needs hidden channels, got mlp_ratio={mlp_ratio}")
        check_choice(_STEMS, stem=stem)
        check_choice(_DOWNSAMPLES, downsample=downsample)
        first = _STEMS[stem](in_chans, embed_dim, **dd)
        drop_paths = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        block: Dict[str, Any] = dict(
            mixer=mixer, ssm_ratio=ssm_ratio, d_state=d_state, conv_bias=conv_bias, gate=gate, mlp_ratio=mlp_ratio
        )
        block.update(mlp=mlp, num_experts=num_experts, capacity_factor=capacity_factor)
        dims = [embed_dim * 2**i for i in range(len(depths))]
        stages = []
        for i, dim in enumerate(dims):
            between = _DOWNSAMPLES[downsample](dims[i - 1], dim, **dd) if i else nn.Identity()
            stages.append(Stage(between, [VMambaBlock(dim, drop_path=rate, **block, **dd) for rate in drop_paths[i]]))
        norm = LayerNorm2d(dims[-1], eps=NORM_EPS, **dd)
        super().__init__(first, stages, dims, norm, in_chans, num_classes, global_pool, drop_rate, **dd)

    def filter_checkpoint(self, state_dict: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """See `vmamba.models.vmamba.checkpoint_filter_fn`."""
        return checkpoint_filter_fn(state_dict, self)


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

_SSD_NAMES = ((r'\.mixer\.conv2d\.1\.', '.mixer.conv2d.'), (r'\.mixer\.dt_proj_bias$', '.mixer.dt_bias'))


def checkpoint_filter_fn(state_dict: Dict[str, Tensor], model: nn.Module) -> Dict[str, Tensor]:
    """Renames and reshapes any known layout of VMamba to this library's.

    Known are the layouts of this library (unchanged), of the release, its legacy names, the single-file code, linear
    layers as 1x1 convolutions, and backbones of detectors and segmentors, official or of this library. The `outnorm3`
    of a backbone becomes the final norm.

    Args:
        state_dict: Weights in a known layout.
        model: VMamba model.

    Returns:
        Weights with the model's names.
    """
    state_dict = split_norms(state_dict)
    if not any(key.startswith(('layers.', 'patch_embed.')) for key in state_dict):
        return state_dict
    state_dict = {rename(key, _LEGACY_NAMES): value for key, value in state_dict.items()}
    names = _sequential_names(state_dict)
    rules = (*_RENAMES, *_SSD_NAMES) if any('.op.conv2d.1.' in key for key in state_dict) else _RENAMES
    out = {}
    for key, value in state_dict.items():
        module, _, parameter = key.rpartition('.')
        key = f'{names[module]}.{parameter}' if module in names else rename(key, rules)
        out[key] = _reshape(key, value, ssd=rules is not _RENAMES)
    return out


def _sequential_names(state_dict: Dict[str, Tensor]) -> Dict[str, str]:
    """Names of the modules in stem and downsamplers, by weight shape and order; numbers differ between layouts."""
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


def _reshape(key: str, value: Tensor, ssd: bool) -> Tensor:
    """One parameter in this library's shape; unknown shapes pass unchanged and are reported later."""
    if key.endswith('.x_proj.weight'):  # [4, R + 2N, D] or [4 * (R + 2N), D(, 1, 1)]
        return value.flatten(0, 1) if value.ndim == 3 and value.shape[0] == 4 else _matrix(value)
    if key.endswith('.dt_proj_weight'):  # [4, D, R] or [4 * D, R(, 1, 1)]
        return value if value.ndim == 3 and value.shape[0] == 4 else _routes(_matrix(value), 2)
    if key.endswith('.A_log'):  # [4 * D, N], or [4, R] in the models on the scan of Mamba-2
        return value if ssd else _routes(value, 2)
    if key.endswith(('.dt_proj_bias', '.D')):  # [4, D] or [4 * D]
        return _routes(value, 1)
    if key.endswith(('_proj.weight', '.fc1.weight', '.fc2.weight', '.fc.weight', '.reduction.weight')):
        return _matrix(value)
    return value


def _matrix(value: Tensor) -> Tensor:
    """[m, n, 1, ...] -> [m, n]: a linear layer stored as a 1x1 convolution"""
    return value.flatten(1) if value.ndim > 2 and value.shape[2:].numel() == 1 else value


def _routes(value: Tensor, ndim: int) -> Tensor:
    """[4 * D, ...] with ndim dimensions -> [4, D, ...]; other shapes pass unchanged"""
    if value.ndim != ndim or value.shape[0] % 4:
        return value
    return value.unflatten(0, (4, value.shape[0] // 4))


def _cfg(file: str = '', **kwargs: Any) -> Dict[str, Any]:
    return {
        'url': f'https://github.com/MzeroMiko/VMamba/releases/download/{file}' if file else '',
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
        'license': 'mit',
        'paper_ids': 'arXiv:2401.10166',
        'origin_url': 'https://github.com/MzeroMiko/VMamba',
        **kwargs,
    }


_MAMBA2_PAPERS = 'arXiv:2401.10166', 'arXiv:2405.21060'
default_cfgs = generate_default_cfgs(
    {
        'vmamba_t.in1k': _cfg('%23v2cls/vssm1_tiny_0230s_ckpt_epoch_264.pth'),
        'vmamba_s.in1k': _cfg('%23v2cls/vssm_small_0229_ckpt_epoch_222.pth'),
        'vmamba_b.in1k': _cfg('%23v2cls/vssm_base_0229_ckpt_epoch_237.pth'),
        'vmamba_t_s2l5.in1k': _cfg('%23v2cls/vssm_tiny_0230_ckpt_epoch_262.pth'),
        'vmamba_s_s1l20.in1k': _cfg('%23v2cls/vssm1_small_0229s_ckpt_epoch_240.pth'),
        'vmamba_b_s1l20.in1k': _cfg('%23v2cls/vssm1_base_0229s_ckpt_epoch_225.pth'),
        'vmamba_t_v0.in1k': _cfg('%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth', first_conv='stem.conv'),
        'vmamba_s_v0.in1k': _cfg('%23v0cls/vssmsmall_dp03_ckpt_epoch_238.pth', first_conv='stem.conv'),
        'vmamba_b_v0.in1k': _cfg('%23v0cls/vssmbase_dp06_ckpt_epoch_241.pth', first_conv='stem.conv'),
        'vmamba_t_m2.untrained': _cfg(paper_ids=_MAMBA2_PAPERS),
        'vmamba_s_m2.untrained': _cfg(paper_ids=_MAMBA2_PAPERS),
        'vmamba_b_m2.untrained': _cfg(paper_ids=_MAMBA2_PAPERS),
        'vmamba_nano.untrained': _cfg(input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0),
        'vmamba_nano_moe.untrained': _cfg(input_size=(3, 32, 32), pool_size=(1, 1), crop_pct=1.0),
    }
)


def _create_vmamba(variant: str, pretrained: bool = False, **kwargs: Any) -> VMamba:
    feature_cfg = dict(out_indices=(0, 1, 2, 3), flatten_sequential=True)
    return build_model(VMamba, variant, pretrained, feature_cfg, **kwargs)


_V0 = dict(ssm_ratio=2.0, d_state=16, conv_bias=True, gate=True, mlp_ratio=0.0, stem='patch', downsample='patch')


@register_model
def vmamba_t(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T (s1l8)"""
    args = dict(depths=(2, 2, 8, 2), embed_dim=96, ssm_ratio=1.0)
    return _create_vmamba('vmamba_t', pretrained, **{**args, **kwargs})


@register_model
def vmamba_s(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S (s2l15)"""
    args = dict(depths=(2, 2, 15, 2), embed_dim=96, ssm_ratio=2.0)
    return _create_vmamba('vmamba_s', pretrained, **{**args, **kwargs})


@register_model
def vmamba_b(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B (s2l15)"""
    args = dict(depths=(2, 2, 15, 2), embed_dim=128, ssm_ratio=2.0)
    return _create_vmamba('vmamba_b', pretrained, **{**args, **kwargs})


@register_model
def vmamba_t_s2l5(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T with 2 x inner channels and 5 blocks in the third stage"""
    args = dict(depths=(2, 2, 5, 2), embed_dim=96, ssm_ratio=2.0)
    return _create_vmamba('vmamba_t_s2l5', pretrained, **{**args, **kwargs})


@register_model
def vmamba_s_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S with 1 x inner channels and 20 blocks in the third stage"""
    args = dict(depths=(2, 2, 20, 2), embed_dim=96, ssm_ratio=1.0)
    return _create_vmamba('vmamba_s_s1l20', pretrained, **{**args, **kwargs})


@register_model
def vmamba_b_s1l20(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B with 1 x inner channels and 20 blocks in the third stage"""
    args = dict(depths=(2, 2, 20, 2), embed_dim=128, ssm_ratio=1.0)
    return _create_vmamba('vmamba_b_s1l20', pretrained, **{**args, **kwargs})


@register_model
def vmamba_t_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first VMamba-T ("vanilla")"""
    args = dict(depths=(2, 2, 9, 2), embed_dim=96, **_V0)
    return _create_vmamba('vmamba_t_v0', pretrained, **{**args, **kwargs})


@register_model
def vmamba_s_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first VMamba-S ("vanilla")"""
    args = dict(depths=(2, 2, 27, 2), embed_dim=96, **_V0)
    return _create_vmamba('vmamba_s_v0', pretrained, **{**args, **kwargs})


@register_model
def vmamba_b_v0(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """The first VMamba-B ("vanilla")"""
    args = dict(depths=(2, 2, 27, 2), embed_dim=128, **_V0)
    return _create_vmamba('vmamba_b_v0', pretrained, **{**args, **kwargs})


_SSD = dict(mixer='ssd2d', ssm_ratio=1.0, d_state=64)


@register_model
def vmamba_t_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-T on the scan of Mamba-2; no weights are published"""
    args = dict(depths=(2, 2, 4, 2), embed_dim=96, **_SSD)
    return _create_vmamba('vmamba_t_m2', pretrained, **{**args, **kwargs})


@register_model
def vmamba_s_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-S on the scan of Mamba-2; no weights are published"""
    args = dict(depths=(2, 2, 12, 2), embed_dim=96, **_SSD)
    return _create_vmamba('vmamba_s_m2', pretrained, **{**args, **kwargs})


@register_model
def vmamba_b_m2(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-B on the scan of Mamba-2; no weights are published"""
    args = dict(depths=(2, 2, 12, 2), embed_dim=128, **_SSD)
    return _create_vmamba('vmamba_b_m2', pretrained, **{**args, **kwargs})


@register_model
def vmamba_nano(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """A small VMamba for small images; no weights are published"""
    args = dict(depths=(1, 1, 2, 1), embed_dim=32, ssm_ratio=2.0)
    return _create_vmamba('vmamba_nano', pretrained, **{**args, **kwargs})


@register_model
def vmamba_nano_moe(pretrained: bool = False, **kwargs: Any) -> VMamba:
    """VMamba-nano with experts as MLPs; no weights are published"""
    args = dict(depths=(1, 1, 2, 1), embed_dim=32, ssm_ratio=2.0, mlp='moe', num_experts=4)
    return _create_vmamba('vmamba_nano_moe', pretrained, **{**args, **kwargs})


register_model_deprecations(
    __name__,
    {
        'vmamba_tiny_s1l8': 'vmamba_t',
        'vmamba_small_s2l15': 'vmamba_s',
        'vmamba_base_s2l15': 'vmamba_b',
        'vmamba_tiny_s2l5': 'vmamba_t_s2l5',
        'vmamba_small_s1l20': 'vmamba_s_s1l20',
        'vmamba_base_s1l20': 'vmamba_b_s1l20',
        'vanilla_vmamba_tiny': 'vmamba_t_v0',
        'vanilla_vmamba_small': 'vmamba_s_v0',
        'vanilla_vmamba_base': 'vmamba_b_v0',
        'vmamba_tiny_m2': 'vmamba_t_m2',
        'vmamba_small_m2': 'vmamba_s_m2',
        'vmamba_base_m2': 'vmamba_b_m2',
    },
)
