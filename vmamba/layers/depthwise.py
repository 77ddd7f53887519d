"""Depthwise convolutions of sequences and of maps, channels last."""

from typing import Optional

from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import causal_conv1d, depthwise_conv2d
from .options import check_counts


@register_notrace_module
class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of a channels-last map, which keeps its size; see `vmamba.kernels.depthwise_conv2d`.

    Args:
        dim: Channels d.
        kernel_size: Odd side of the window.
        bias: Whether there is a bias.
        silu: Return silu of the result.
    """

    def __init__(
        self, dim: int, kernel_size: int = 3, bias: bool = True, silu: bool = False, device=None, dtype=None
    ) -> None:
        check_counts(dim=dim, kernel_size=kernel_size)
        if kernel_size % 2 == 0:
            raise ValueError(f'kernel_size must be odd, got {kernel_size}')
        options = dict(padding=kernel_size // 2, groups=dim, bias=bias, device=device, dtype=dtype)
        super().__init__(dim, dim, kernel_size, **options)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, d] -> [B, H, W, d]"""
        return depthwise_conv2d(x, self.weight.squeeze(1), self.bias, self.silu)


@register_notrace_module
class CausalConv1d(nn.Conv1d):
    """Causal depthwise convolution of a sequence with SiLU; see `vmamba.kernels.causal_conv1d`.

    Args:
        dim: Channels d.
        kernel_size: Width w of the window.
        bias: Whether there is a bias.
    """

    def __init__(self, dim: int, kernel_size: int = 4, bias: bool = True, device=None, dtype=None) -> None:
        check_counts(dim=dim, kernel_size=kernel_size)
        options = dict(padding=kernel_size - 1, groups=dim, bias=bias, device=device, dtype=dtype)
        super().__init__(dim, dim, kernel_size, **options)

    def forward(self, x: Tensor, seq_idx: Optional[Tensor] = None, initial_states: Optional[Tensor] = None) -> Tensor:
        """[B, L, d] -> [B, L, d]

        Args:
            x: [B, L, d].
            seq_idx: Integers [B, L], the number of the packed sequence of each position.
            initial_states: The inputs before x [B, d, w - 1], zero by default.
        """
        weight = self.weight.squeeze(1)
        out = causal_conv1d(x.mT, weight, self.bias, seq_idx=seq_idx, initial_states=initial_states, activation='silu')
        return out.mT
