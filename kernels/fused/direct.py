"""Operators that are called without PyTorch's dispatcher where nothing watches."""

from typing import Any, Callable, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import CustomOpDef

from ..backend import needs_gradients, operators_are_watched

Gradients = tuple[Optional[Tensor], ...]


def differentiable(
    operator: CustomOpDef,
    forward: Callable[..., tuple[Tensor, ...]],
    operator_backward: CustomOpDef,
    backward: Callable[..., tuple[Tensor, ...]],
    setup_context: Callable[[Any, tuple, tuple], None],
    gradients: Callable[..., Gradients],
    results: int,
) -> Callable[..., tuple[Tensor, ...]]:
    """Registers an operator's backward pass, and makes the function that calls the operator or what it stands for.

    Args:
        operator, forward: An operator and its function, whose last argument says whether to keep what gradients need.
            The first `results` outputs are results, the others are what is kept.
        operator_backward, backward: The same of its backward pass.
        setup_context: As of `torch.library.register_autograd`.
        gradients: Makes the gradients of all inputs from either of the two of the backward pass, a context, and the
            gradients of the results.

    Returns:
        A function of the operator's arguments but the last, which returns the results.
    """

    def operator_gradients(ctx: Any, *grads: Optional[Tensor]) -> Gradients:
        return gradients(operator_backward, ctx, *grads[:results])

    operator.register_autograd(operator_gradients, setup_context=setup_context)

    class Direct(torch.autograd.Function):
        """The context is set up within the forward pass: PyTorch's way to do it apart inspects signatures at each call,
        which takes longer than the kernels."""

        @staticmethod
        def forward(ctx, *inputs):
            output = forward(*inputs)
            setup_context(ctx, inputs, output)
            return output[:results]

        @staticmethod
        @once_differentiable
        def backward(ctx, *grads):
            return gradients(operator_backward if operators_are_watched() else backward, ctx, *grads)

    def call(*arguments: Any) -> tuple[Tensor, ...]:
        keep = needs_gradients(*(argument for argument in arguments if isinstance(argument, Tensor)))
        if operators_are_watched():
            run = operator
        else:
            run = Direct.apply if keep else forward
        return run(*arguments, keep)[:results]

    return call
