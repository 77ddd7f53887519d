"""Operators of torch from launches of convolutions, which differ in their kernels only."""

from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backend import device_of, needs_gradients, operators_are_watched

Gradients = tuple[Tensor, Tensor, Optional[Tensor]]


def convolution(
    name: str,
    forward: Callable[[Tensor, Tensor, Optional[Tensor], bool], Tensor],
    backward: Callable[[Tensor, Tensor, Tensor, Optional[Tensor], bool], Gradients],
    empty_output: Callable[[Tensor, Tensor], Tensor],
    empty_gradient: Callable[[Tensor], Tensor],
) -> Callable[[Tensor, Tensor, Optional[Tensor], bool], Tensor]:
    """Registers the operators `name` and `name`_backward of namespace vmamba.

    Args:
        forward: Makes the output from x, weight, bias and whether SiLU follows. Only these are kept.
        backward: Makes the gradients of x in its dtype, and of weight and bias in any, from the output's and these.
        empty_output: The output's shape, dtype and layout, of x and weight.
        empty_gradient: Those of the gradient of x.

    Returns:
        A function of forward's arguments, which goes past the dispatcher where nothing watches.
    """

    def run_forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
        with device_of(x):
            return forward(x, weight, bias, silu)

    def run_backward(
        grad_out: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of a bias that is not there is empty."""
        with device_of(x):
            grad_x, *grads = backward(grad_out, x, weight, bias, silu)
        return grad_x, *(
            like if grad is None else like.copy_(grad) for grad, like in zip(grads, _empty(x, weight, bias))
        )

    operator = torch.library.custom_op(f'vmamba::{name}', run_forward, mutates_args=())
    operator.register_fake(lambda x, weight, bias, silu: empty_output(x, weight))
    operator_backward = torch.library.custom_op(f'vmamba::{name}_backward', run_backward, mutates_args=())
    operator_backward.register_fake(
        lambda grad_out, x, weight, bias, silu: (empty_gradient(x), *_empty(x, weight, bias))
    )
    operator.register_autograd(
        lambda ctx, grad_out: _gradients(operator_backward, ctx, grad_out), setup_context=_setup_context
    )

    class Direct(torch.autograd.Function):
        """The operator without the dispatcher, as `differentiable` makes it for those that keep something."""

        @staticmethod
        def forward(ctx, *inputs):
            output = run_forward(*inputs)
            _setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx, grad_out):
            return _gradients(operator_backward if operators_are_watched() else run_backward, ctx, grad_out)

    def call(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
        if operators_are_watched():
            return operator(x, weight, bias, silu)
        recorded = needs_gradients(*(tensor for tensor in (x, weight, bias) if tensor is not None))
        return (Direct.apply if recorded else run_forward)(x, weight, bias, silu)

    return call


def _empty(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """Uninitialised gradients of weight and bias."""
    empty = (None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in (weight, bias))
    return tuple(x.new_empty(0) if tensor is None else tensor for tensor in empty)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(backward: Callable[..., Gradients], ctx: Any, grad_out: Tensor) -> tuple[Optional[Tensor], ...]:
    """Gradients of all inputs, made by `backward` or the operator of it."""
    tensors = ctx.saved_tensors  # once: under checkpointing each look makes them again
    *grads, grad_bias = backward(grad_out, *tensors, ctx.silu)
    return *grads, None if tensors[2] is None else grad_bias, None
