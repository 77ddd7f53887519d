"""Matrix products of the branches: maps [..., channels] with weights [out, in], by the library of the device."""

import torch
from torch import Tensor

# Products of 16-bit matrices with fp32 results came with torch 2.8, for NVIDIA GPUs.
_HAS_WIDE_RESULTS = torch.version.hip is None and tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 8)


def rows_of(x: Tensor) -> Tensor:
    """[..., d] -> [rows, d]"""
    return x.view(-1, x.shape[-1])


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """[..., in] and [out, in] -> [..., out]"""
    return torch.mm(rows_of(x), weight.t()).view(*x.shape[:-1], weight.shape[0])


def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of a linear layer's input, [rows, out] and [out, in] -> [rows, in]."""
    return torch.mm(grad, weight)


def weight_gradient(grad: Tensor, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of a linear layer's weight in a dtype, [rows, out] and [rows, in] -> [out, in]."""
    if dtype == torch.float32 != x.dtype and x.is_cuda and _HAS_WIDE_RESULTS:
        return torch.mm(grad.t(), x, out_dtype=dtype)
    return torch.mm(grad.t(), x).to(dtype)
