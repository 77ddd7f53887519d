"""A residual stream in fp32, the norms that add to it, and norms whose results are in autocast's dtype."""

from typing import NamedTuple, Optional, Tuple, Union

import torch
from timm.layers import LayerNorm, LayerNorm2d, RmsNorm
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import add_layer_norm, add_rms_norm, layer_norm


class ResidualStream(NamedTuple):
    """The stream residual + scale * hidden, whose sum is left to the norm that reads it next.

    Args:
        hidden: What the last layer adds, [B, ..., d].
        residual: The stream before it, [B, ..., d] in at least fp32; None at the start, where hidden is the stream.
        scale: Factor of each sample, [B]; None for 1.
    """

    hidden: Tensor
    residual: Optional[Tensor] = None
    scale: Optional[Tensor] = None

    def total(self) -> Tensor:
        """[B, ..., d]"""
        hidden = self.hidden
        if self.scale is not None:
            hidden = (hidden.movedim(0, -1) * self.scale).movedim(-1, 0)  # FX does not know how many axes to insert
        return hidden if self.residual is None else self.residual + hidden


class _AutocastNorm(nn.Module):
    """Lets a norm of timm return autocast's dtype.

    Args:
        dim: Channels d.
        eps: Added to the mean square or the variance.
        autocast: Return autocast's dtype where that is enabled, for a layer that would cast to it anyway; the weight's
            dtype otherwise.
    """

    def __init__(self, dim: int, eps: float = 1e-5, autocast: bool = False, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.autocast = autocast

    def _out_dtype(self, device: str) -> torch.dtype:
        # Autocast leaves fp64 alone, and does not know tensors without data.
        if not self.autocast or self.weight.dtype == torch.float64 or device == 'meta':
            return self.weight.dtype
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype


class _AddNorm(_AutocastNorm):
    """Norm of a residual stream: computes in at least fp32, adding what is yet to be added in the same pass."""

    def forward(self, x: Union[Tensor, ResidualStream]) -> Union[Tensor, Tuple[Tensor, Tensor]]:
        """x [B, ..., d] -> normalised [B, ..., d]; of a ResidualStream also its sum"""
        is_stream = isinstance(x, ResidualStream)
        stream = x if is_stream else ResidualStream(x)
        normalised, summed = self._add_norm(*stream, self._out_dtype(stream.hidden.device.type))
        return (normalised, summed) if is_stream else normalised

    def _add_norm(
        self, hidden: Tensor, residual: Optional[Tensor], scale: Optional[Tensor], dtype: torch.dtype
    ) -> Tuple[Tensor, Tensor]:
        raise NotImplementedError


@register_notrace_module
class AddRmsNorm(_AddNorm, RmsNorm):
    """RMSNorm of a residual stream; see `_AddNorm`."""

    def _add_norm(
        self, hidden: Tensor, residual: Optional[Tensor], scale: Optional[Tensor], dtype: torch.dtype
    ) -> Tuple[Tensor, Tensor]:
        return add_rms_norm(hidden, residual, self.weight, self.eps, scale, dtype)


@register_notrace_module
class AddLayerNorm(_AddNorm, LayerNorm):
    """LayerNorm of a residual stream; see `_AddNorm`."""

    def _add_norm(
        self, hidden: Tensor, residual: Optional[Tensor], scale: Optional[Tensor], dtype: torch.dtype
    ) -> Tuple[Tensor, Tensor]:
        return add_layer_norm(hidden, residual, self.weight, self.bias, self.eps, scale, dtype)


@register_notrace_module
class FusedLayerNorm2d(_AutocastNorm, LayerNorm2d):
    """LayerNorm over the channels of a map, from any dtype to that which its reader takes in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, d, H, W] -> [B, d, H, W], in channels-last memory"""
        x = x.permute(0, 2, 3, 1)  # [B, d, H, W] -> [B, H, W, d]
        x = layer_norm(x, self.weight, self.bias, self.eps, self._out_dtype(x.device.type))
        return x.permute(0, 3, 1, 2)
