"""Depthwise convolution of channels-last maps."""

from timm.models import register_notrace_module
from torch import Tensor, nn

from ..kernels import depthwise_conv2d
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
