"""Linear layers in fp32 on a CPU, by oneDNN.

PyTorch multiplies fp32 matrices by MKL, which leaves half of an AMD processor's vector units unused where oneDNN does
not. Elsewhere these functions are PyTorch's own.
"""

from functools import cache
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from ._operator import is_watched

# Multiply-adds of a product below which the call itself takes the time.
_MIN_MACS = 2**21


def linear(x: Tensor, weight: Tensor, bias: Optional[Tensor] = None) -> Tensor:
    """weight @ x + bias over the last dimension, as `torch.nn.functional.linear`: differentiable any number of times.

    Args:
        x: [..., in], in any floating dtype.
        weight: [out, in].
        bias: [out].

    Returns:
        [..., out], contiguous.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not _uses_onednn(tensors):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in tensors]):
        # A view that is made within a Function cannot be changed in place later.
        return _Linear.apply(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])
    return _multiply(x, weight, bias)


class _Linear(torch.autograd.Function):
    """[rows, in], [out, in], [out] -> [rows, out]"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tuple[Optional[Tensor], ...]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad, weight.t())
        if ctx.needs_input_grad[1]:
            # oneDNN transposes its second matrix: the narrower one.
            wide = grad.shape[1] > x.shape[1]
            grad_weight = linear(x.t(), grad.t()).t() if wide else linear(grad.t(), x.t())
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=0)
        return grad_x, grad_weight, grad_bias


def _multiply(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, 'none', [], '')


def _dense(matrix: Tensor) -> Tensor:
    """Contiguous, or the transpose of a contiguous matrix."""
    return matrix if matrix.ndim == 2 and matrix.t().is_contiguous() else matrix.contiguous()


def _uses_onednn(tensors: Tuple[Tensor, ...]) -> bool:
    if is_watched():
        return False
    x, weight, *_ = tensors
    for tensor in tensors:
        plain = type(tensor) in (Tensor, torch.nn.Parameter)
        if not plain or tensor.dtype != torch.float32 or tensor.device.type != 'cpu':
            return False
    return (
        x.ndim >= 2
        and x.numel() * weight.shape[0] >= _MIN_MACS
        and x.shape[-1] == weight.shape[-1]
        and _has_onednn()
        and not torch.is_autocast_enabled('cpu')
        and forward_ad._current_level < 0
    )


@cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith('AVX512')
