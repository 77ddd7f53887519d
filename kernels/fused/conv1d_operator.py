"""Causal convolutions on the Triton kernels as an operator of torch."""

from typing import Callable, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import device_of, needs_gradients, operators_are_watched
from .conv1d_launch import conv_backward, conv_forward
from .conv1d_plan import empty_outputs


def _forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
    with device_of(x):
        return conv_forward(x, weight, bias, silu)


_causal_conv1d = torch.library.custom_op('vmamba::causal_conv1d_fused', _forward, mutates_args=())


@_causal_conv1d.register_fake
def _(x, weight, bias, silu):
    return empty_outputs(x, weight.shape[0], x.dtype)


def _backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of weight and of bias, which is empty if there is none."""
    grad_x = torch.empty_like(x)
    with device_of(x):
        grad_weight, grad_bias = conv_backward(grad_u, x, weight, bias, silu, grad_x)
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format).copy_(grad_weight)
    if bias is None:
        return grad_x, grad_weight, x.new_empty(0)
    return grad_x, grad_weight, torch.empty_like(bias, memory_format=torch.contiguous_format).copy_(grad_bias)


_causal_conv1d_backward = torch.library.custom_op('vmamba::causal_conv1d_fused_backward', _backward, mutates_args=())


@_causal_conv1d_backward.register_fake
def _(grad_u, x, weight, bias, silu):
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    if bias is None:
        return torch.empty_like(x), grad_weight, x.new_empty(0)
    return torch.empty_like(x), grad_weight, torch.empty_like(bias, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(backward: Callable[..., tuple[Tensor, ...]], ctx, grad_u: Tensor) -> tuple[Optional[Tensor], ...]:
    """Gradients of all inputs, made by `backward`: `_backward` or the operator of it."""
    tensors = ctx.saved_tensors  # once: under checkpointing each look makes them again
    *grads, grad_bias = backward(grad_u, *tensors, ctx.silu)
    return *grads, None if tensors[2] is None else grad_bias, None


def _operator_gradients(ctx, grad_u: Tensor) -> tuple[Optional[Tensor], ...]:
    return _gradients(_causal_conv1d_backward, ctx, grad_u)


_causal_conv1d.register_autograd(_operator_gradients, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, as `differentiable` makes it for those that keep something."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_u):
        return _gradients(_causal_conv1d_backward if operators_are_watched() else _backward, ctx, grad_u)


def run_causal_conv1d(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
    """`conv_forward` with gradients."""
    if operators_are_watched():
        return _causal_conv1d(x, weight, bias, silu)
    recorded = needs_gradients(*(tensor for tensor in (x, weight, bias) if tensor is not None))
    return (_Direct.apply if recorded else _forward)(x, weight, bias, silu)
