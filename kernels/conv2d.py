"""VMamba's depthwise convolution of a channels-last map, with the activation that follows."""

from typing import Optional

import torch.nn.functional as F
from torch import Tensor

from .backend import check_tensors, runs_on_triton, triton
from .routed import check_shape

if triton is not None:
    from .fused.conv2d_operator import run_depthwise_conv2d
    from .fused.conv2d_plan import KERNELS


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None, silu: bool = False) -> Tensor:
    """Depthwise 2-D convolution of a channels-last map, which keeps its size.

    With an odd kernel of k x k taps, c = (k - 1) / 2, and x zero outside of the map:

        out_{h,w} = bias + sum_{i,j} weight[:, i, j] * x_{h + i - c, w + j - c}

    By Triton for k up to 5, computed in fp32; otherwise by PyTorch's convolution in x's dtype, to which it rounds the
    weight, and before SiLU the result. Differentiable in reverse mode in every tensor.

    Args:
        x: [B, H, W, D], in any floating dtype and with any strides; fast where channels are neighbours in memory.
        weight: [D, k, k].
        bias: [D].
        silu: Return silu(out).

    Returns:
        out [B, H, W, D] in x's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    check_tensors('depthwise_conv2d', x=x, weight=weight, bias=bias)
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(f'x must be a floating [B, H, W, D] tensor, got {tuple(x.shape)} {x.dtype}')
    dim, kernel = x.shape[-1], weight.shape[-1] if weight.ndim else 0
    if tuple(weight.shape) != (dim, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(f'weight must be [{dim}, k, k] with odd k, got {tuple(weight.shape)}')
    if bias is not None:
        check_shape('bias', bias, (dim,))
    if runs_on_triton(x) and kernel in KERNELS:
        return run_depthwise_conv2d(x, weight, bias, silu)
    return _plain(x, weight, bias, silu)


def _plain(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
    dim, kernel, _ = weight.shape
    weight, bias = weight.unsqueeze(1).to(x.dtype), None if bias is None else bias.to(x.dtype)
    out = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=kernel // 2, groups=dim)  # in NCHW view of x's memory
    out = out.permute(0, 2, 3, 1).to(x.dtype).contiguous()  # both are so, but under autocast and in odd layouts
    return F.silu(out) if silu else out
