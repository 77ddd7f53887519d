"""Causal convolutions on the Triton kernels as an operator of torch."""

from typing import Optional

import torch
from torch import Tensor

from .conv1d_launch import conv_backward, conv_forward
from .conv1d_plan import empty_outputs
from .convolution import convolution


def _gradients(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool
) -> tuple[Tensor, Tensor, Optional[Tensor]]:
    grad_x = torch.empty_like(x)
    return grad_x, *conv_backward(grad_u, x, weight, bias, silu, grad_x)


run_causal_conv1d = convolution(
    'causal_conv1d_fused',
    conv_forward,
    _gradients,
    lambda x, weight: empty_outputs(x, weight.shape[0], x.dtype),
    torch.empty_like,
)
