"""VMamba's front ends and the downsampling between its stages, in NCHW views of channels-last memory.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

from functools import partial

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from .image import check_images
from .norm import AddLayerNorm, FusedLayerNorm2d

NORM_EPS = 1e-5


@register_notrace_module
class ImageConv2d(nn.Conv2d):
    """A convolution of images, in channels-last memory, whatever theirs.

    On a GPU those of 16 bits get channels of zeros up to a multiple of 8, without which none run on tensor cores.
    """

    def forward(self, x: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled('cuda') and x.dtype != torch.float64  # it leaves fp64 alone
        dtype = torch.get_autocast_dtype('cuda') if autocast else x.dtype
        if not x.is_cuda or dtype.itemsize != 2:
            return super().forward(x.contiguous(memory_format=torch.channels_last))
        zeros = (0, 0, 0, 0, 0, -self.in_channels % 8)
        x = F.pad(x.to(dtype, memory_format=torch.channels_last), zeros)
        return self._conv_forward(x, F.pad(self.weight, zeros), self.bias)


class ConvStem(nn.Module):
    """Two overlapping 3x3 convolutions of stride 2, each normalised: [B, C, H, W] -> [B, d, H/4, W/4]."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.conv1 = ImageConv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd)
        self.norm1 = FusedLayerNorm2d(dim // 2, eps=NORM_EPS, autocast=True, **dd)
        self.act = nn.GELU()
        self.conv2 = nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd)
        self.norm2 = FusedLayerNorm2d(dim, eps=NORM_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, 1)
        x = self.act(self.norm1(self.conv1(x)))
        return self.norm2(self.conv2(x))


class PatchStem(nn.Module):
    """Patches of 4x4 embedded by one convolution and normalised: [B, C, H, W] -> [B, d, H/4, W/4]."""

    def __init__(self, in_chans: int, dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.in_chans = in_chans
        self.conv = ImageConv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = FusedLayerNorm2d(dim, eps=NORM_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        check_images(x, self.in_chans, 4)
        return self.norm(self.conv(x))


class ConvDownsample(nn.Module):
    """Overlapping 3x3 convolution of stride 2, normalised: [B, d, H, W] -> [B, d', H/2, W/2]."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.conv = nn.Conv2d(dim, out_dim, 3, stride=2, padding=1, **dd)
        self.norm = FusedLayerNorm2d(out_dim, eps=NORM_EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class MergeDownsample(PatchMerging):
    """Patches of 2x2 concatenated, normalised, projected: [B, d, H, W] -> [B, d', H/2, W/2]; odd sides are padded."""

    def __init__(self, dim: int, out_dim: int, device=None, dtype=None) -> None:
        norm = partial(AddLayerNorm, eps=NORM_EPS, autocast=True)
        super().__init__(dim, out_dim, norm_layer=norm, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x.permute(0, 2, 3, 1))  # [B, d, H, W] -> [B, H, W, d]
        return x.permute(0, 3, 1, 2)
