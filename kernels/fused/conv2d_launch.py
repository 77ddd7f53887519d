"""Launches the kernels of depthwise 2-D convolutions."""

from typing import Optional

import torch
from torch import Tensor

from ..backend import compiles_for_nvidia, processors_of
from . import conv2d_plan
from .arithmetic import parts
from .conv2d import depthwise_conv2d, depthwise_conv2d_backward
from .conv2d_plan import is_wide, split, strip_of
from .launcher import Launcher

_depthwise_conv2d = Launcher(depthwise_conv2d)
_depthwise_conv2d_backward = Launcher(depthwise_conv2d_backward)

# More registers than these would leave too few warps to wait for memory; they are enough for nine taps and their sums.
_BACKWARD_REGISTERS = 128


def _taps_first(weight: Tensor) -> Tensor:
    """[D, k, k] -> [k * k, D], which the kernels can load without gaps"""
    return weight.flatten(1).t().contiguous()


def conv_forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool, flip: bool = False) -> Tensor:
    """Depthwise convolution of a map, and SiLU of it on request; computed in fp32.

    Args:
        x: [B, H, W, D] with any strides; fast where channels are neighbours in memory.
        weight: [D, k, k] with odd k up to 5.
        bias: [D].
        silu: Whether SiLU follows.
        flip: Take the taps in reverse order, which makes the convolution's adjoint.

    Returns:
        [B, H, W, D] in x's dtype, contiguous.
    """
    batch, height, width, dim = x.shape
    kernel = weight.shape[1]
    out = x.new_empty(x.shape)
    strip, channels = strip_of(x, kernel, ahead=2), conv2d_plan.CHANNELS
    _depthwise_conv2d(
        parts(dim, channels) * parts(width, strip.pixels) * parts(height, strip.rows) * batch,
        (x, _taps_first(weight), x if bias is None else bias.contiguous(), out),
        (height, width, dim, *x.stride()),
        (kernel, bias is not None, silu, flip, *strip, channels, is_wide(strip, x), compiles_for_nvidia(x)),
        warps=strip.pixels // 4,  # four channels for a thread
    )
    return out


def conv_backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    """Gradients of `conv_forward`, the same at every run.

    The convolution before SiLU is made again from x; its gradient is rounded to x's dtype on the way to that of x.

    Args:
        grad_out: Gradient of the output [B, H, W, D] with any strides.

    Returns:
        Gradients of x in its dtype, contiguous; of weight; and, if there is one, of bias; the latter two in fp32.
    """
    batch, height, width, dim = x.shape
    kernel = weight.shape[1]
    strip, channels = strip_of(x, kernel, ahead=1), conv2d_plan.CHANNELS
    regions, strips = split(x, strip, processors_of(x))
    sums = torch.empty(regions, kernel * kernel + 1, dim, dtype=torch.float32, device=x.device)
    grad_pre = x.new_empty(x.shape) if silu else grad_out
    wide, nvidia = is_wide(strip, x, grad_out), compiles_for_nvidia(x)
    _depthwise_conv2d_backward(
        parts(dim, channels) * regions,
        (grad_out, x, _taps_first(weight), x if bias is None else bias.contiguous(), grad_pre, sums),
        (batch, height, width, dim, strips, *grad_out.stride(), *x.stride()),
        (kernel, bias is not None, silu, *strip, channels, wide, nvidia),
        warps=strip.pixels // 2,  # two channels for a thread, which keeps the sums of all taps for each
        registers=_BACKWARD_REGISTERS if nvidia and kernel <= 3 else None,
    )
    total = sums.sum(dim=0)
    grad_x = conv_forward(grad_pre, weight, None, silu=False, flip=True)
    return grad_x, total[:-1].t().reshape(weight.shape), None if bias is None else total[-1]
