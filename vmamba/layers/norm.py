"""timm's norms, computed in at least fp32 and returned in the dtype of the next layer."""

from typing import Optional

import torch
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import LayerNorm2d as TimmLayerNorm2d
from timm.layers import RmsNorm as TimmRmsNorm
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from ..kernels import gated_rms_norm, layer_norm, rms_norm


@register_notrace_function
def widen(x: Tensor) -> Tensor:
    """x in at least fp32, the dtype of the residual stream."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _AutocastNorm(nn.Module):
    """Mixin that lets a timm norm return autocast's dtype.

    Args:
        dim: Channels d.
        eps: Added to the mean square or the variance.
        autocast: Return autocast's dtype if autocast is enabled, for a next layer that casts to it anyway. Otherwise
            the weight's dtype is returned.
    """

    def __init__(self, dim: int, eps: float = 1e-5, autocast: bool = False, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.autocast = autocast

    def out_dtype(self, device: str) -> torch.dtype:
        """Output dtype on a device type."""
        # Autocast skips fp64 and does not support the meta device.
        if not self.autocast or self.weight.dtype == torch.float64 or device == 'meta':
            return self.weight.dtype
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype


@register_notrace_module
class RmsNorm(_AutocastNorm, TimmRmsNorm):
    """RMSNorm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., d] -> [B, ..., d]"""
        return rms_norm(x, self.weight, self.eps, self.out_dtype(x.device.type))


@register_notrace_module
class LayerNorm(_AutocastNorm, TimmLayerNorm):
    """LayerNorm over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, ..., d] -> [B, ..., d]"""
        return layer_norm(x, self.weight, self.bias, self.eps, self.out_dtype(x.device.type))


@register_notrace_module
class LayerNorm2d(_AutocastNorm, TimmLayerNorm2d):
    """LayerNorm over the channels of a channels-first map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, H, W] -> [B, d, H, W], in channels-last memory"""
        x = x.permute(0, 2, 3, 1)  # [B, d, H, W] -> [B, H, W, d]
        x = layer_norm(x, self.weight, self.bias, self.eps, self.out_dtype(x.device.type))
        return x.permute(0, 3, 1, 2)


@register_notrace_module
class GatedRmsNorm(nn.Module):
    """RMSNorm of Mamba-2, over groups of channels and with a gate: rms(y * silu(z)), or rms(y) * silu(z).

    Computed in at least fp32.

    Args:
        dim: Channels d.
        groups: Groups of channels that are normalised separately.
        eps: Added to the mean square.
        norm_before_gate: Multiply by the gate after the norm instead of before it.
    """

    def __init__(
        self,
        dim: int,
        groups: int = 1,
        eps: float = 1e-5,
        norm_before_gate: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        self.groups = groups
        self.eps = eps
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, y: Tensor, z: Tensor, other: Optional[Tensor] = None) -> Tensor:
        """y and its gate z [B, ..., d] -> [B, ..., d] in y's dtype; with another y, of the mean of both"""
        return gated_rms_norm(y, z, self.weight, other, self.groups, self.eps, self.norm_before_gate)
