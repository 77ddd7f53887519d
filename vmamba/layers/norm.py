"""A residual stream in fp32, and the norm that adds to it."""

from typing import NamedTuple, Optional, Tuple, Union

import torch
from timm.layers import DropPath, RmsNorm
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import add_rms_norm


class ResidualStream(NamedTuple):
    """The stream residual + scale * hidden, whose sum is left to the norm that reads it next.

    Args:
        hidden: What the last layer adds, [B, L, d].
        residual: The stream before it, [B, L, d] in at least fp32; None at the start, where hidden is the stream.
        scale: Factor of each sample, [B]; None for 1.
    """

    hidden: Tensor
    residual: Optional[Tensor] = None
    scale: Optional[Tensor] = None

    def total(self) -> Tensor:
        """[B, L, d]"""
        hidden = self.hidden if self.scale is None else self.hidden * self.scale.view(-1, 1, 1)
        return hidden if self.residual is None else self.residual + hidden


def drop_path_scale(drop_path: nn.Module, x: Tensor) -> Optional[Tensor]:
    """Draws the factor of each sample by which timm's DropPath multiplies: [B, ...] -> [B] in fp32.

    None stands for 1: outside of training, at a rate of 0, and for another module than DropPath.
    """
    if not isinstance(drop_path, DropPath) or not drop_path.training or drop_path.drop_prob == 0:
        return None
    keep = 1 - drop_path.drop_prob
    scale = x.new_empty((x.shape[0],), dtype=torch.float32).bernoulli_(keep)
    return scale / keep if drop_path.scale_by_keep and keep > 0 else scale


@register_notrace_module
class AddRmsNorm(RmsNorm):
    """RMSNorm of a residual stream: computes in at least fp32, adding what is yet to be added in the same pass.

    Args:
        dim: Channels d.
        eps: Added to the mean square.
        autocast: Return autocast's dtype where that is enabled, for a linear layer that would cast to it anyway; the
            weight's dtype otherwise.
    """

    def __init__(self, dim: int, eps: float = 1e-5, autocast: bool = False, device=None, dtype=None) -> None:
        super().__init__(dim, eps=eps, device=device, dtype=dtype)
        self.autocast = autocast

    def forward(self, x: Union[Tensor, ResidualStream]) -> Union[Tensor, Tuple[Tensor, Tensor]]:
        """x [B, L, d] -> normalised [B, L, d]; of a ResidualStream also its sum"""
        stream = x if isinstance(x, ResidualStream) else ResidualStream(x)
        hidden, residual, scale = stream
        dtype = self._out_dtype(hidden.device.type)
        normalised, summed = add_rms_norm(hidden, residual, self.weight, self.eps, scale, dtype)
        return (normalised, summed) if stream is x else normalised

    def _out_dtype(self, device: str) -> torch.dtype:
        # Autocast leaves fp64 alone, and does not know tensors without data.
        if not self.autocast or self.weight.dtype == torch.float64 or device == 'meta':
            return self.weight.dtype
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
