"""Depthwise 2-D convolution on the Triton kernels as an operator of torch."""

from typing import Callable, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import device_of, needs_gradients, operators_are_watched
from .conv2d_launch import conv_backward, conv_forward


def _forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
    with device_of(x):
        return conv_forward(x, weight, bias, silu)


_depthwise_conv2d = torch.library.custom_op('vmamba::depthwise_conv2d_fused', _forward, mutates_args=())


@_depthwise_conv2d.register_fake
def _(x, weight, bias, silu):
    return x.new_empty(x.shape)


def _backward(
    grad_out: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of weight and of bias, which is empty if there is none."""
    with device_of(x):
        grad_x, grad_weight, grad_bias = conv_backward(grad_out, x, weight, bias, silu)
    grad_weight = _empty_gradient(weight).copy_(grad_weight)
    return grad_x, grad_weight, x.new_empty(0) if bias is None else _empty_gradient(bias).copy_(grad_bias)


def _empty_gradient(parameter: Tensor) -> Tensor:
    return torch.empty_like(parameter, memory_format=torch.contiguous_format)


_depthwise_conv2d_backward = torch.library.custom_op(
    'vmamba::depthwise_conv2d_fused_backward', _backward, mutates_args=()
)


@_depthwise_conv2d_backward.register_fake
def _(grad_out, x, weight, bias, silu):
    grad_bias = x.new_empty(0) if bias is None else _empty_gradient(bias)
    return x.new_empty(x.shape), _empty_gradient(weight), grad_bias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(backward: Callable[..., tuple[Tensor, ...]], ctx, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
    """Gradients of all inputs, made by `backward`: `_backward` or the operator of it."""
    tensors = ctx.saved_tensors  # once: under checkpointing each look makes them again
    *grads, grad_bias = backward(grad_out, *tensors, ctx.silu)
    return *grads, None if tensors[2] is None else grad_bias, None


def _operator_gradients(ctx, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
    return _gradients(_depthwise_conv2d_backward, ctx, grad_out)


_depthwise_conv2d.register_autograd(_operator_gradients, setup_context=_setup_context)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher, as `differentiable` makes it for those that keep something."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        return _gradients(_depthwise_conv2d_backward if operators_are_watched() else _backward, ctx, grad_out)


def run_depthwise_conv2d(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
    """`conv_forward` with gradients."""
    if operators_are_watched():
        return _depthwise_conv2d(x, weight, bias, silu)
    recorded = needs_gradients(*(tensor for tensor in (x, weight, bias) if tensor is not None))
    return (_Direct.apply if recorded else _forward)(x, weight, bias, silu)
