"""The selective scan on Triton kernels, as an operator of PyTorch."""

from types import ModuleType
from typing import Callable, Optional

import torch
from torch import Tensor

from ..backend import device_of
from .columns import launch as columns
from .direct import differentiable
from .lanes import launch as lanes
from .sequences import Gradients

# From this many states on a channel for each thread takes fewer instructions than lanes along the sequence.
MANY_STATES = 4


def _kernels(A: Tensor) -> ModuleType:
    return columns if A.shape[1] >= MANY_STATES else lanes


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    delta_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    delta_softplus: bool,
    reverse: bool,
    out_dtype: torch.dtype,
    save_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the last state and, on request, the states that the backward pass starts from.

    B and C are [dim, N] or [batch, G, N, L], each with its own number of groups, of which one divides the other.
    """
    y = torch.empty_like(u, dtype=out_dtype)
    if u.shape[0] == 0:
        return y, A.new_empty(0, *A.shape, dtype=torch.float32), _no_states(u)
    with device_of(u):
        last_state, states = _kernels(A).run_forward(
            y, save_states, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse
        )
    return y, last_state, states if save_states else _no_states(u)


_selective_scan = torch.library.custom_op('vmamba::selective_scan_fused', _forward, mutates_args=())


def _no_states(u: Tensor) -> Tensor:
    return u.new_empty(0, dtype=torch.float32)


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, out_dtype, save_states):
    states = _no_states(u)
    if save_states:
        states = u.new_empty(_kernels(A).states_shape(u, A, B, C), dtype=torch.float32)
    last_state = u.new_empty(u.shape[0], *A.shape, dtype=torch.float32)
    return torch.empty_like(u, dtype=out_dtype), last_state, states


def _backward(
    grad_y: Tensor,
    grad_last_state: Optional[Tensor],
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    delta_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    states: Tensor,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of the tensor arguments; an absent argument has an empty one."""
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.shape[0] == 0:
        return tuple(u.new_empty(0) if t is None else torch.zeros_like(t) for t in tensors)
    kernels, arguments = _kernels(A), (*tensors, delta_softplus, reverse)
    if grad_last_state is not None:
        grad_last_state = grad_last_state.float().contiguous()
    with device_of(u):
        if states.ndim == 1:  # the forward pass did not know that gradients would be wanted
            y = torch.empty_like(u, memory_format=torch.contiguous_format)
            _, states = kernels.run_forward(y, True, *arguments)
        grads = kernels.run_backward(grad_y, grad_last_state, states, *arguments)
    names = Gradients._fields
    return tuple(
        u.new_empty(0) if tensor is None else _laid_out(grad, tensor, name in _SEQUENCES)
        for name, tensor, grad in zip(names, tensors, grads)
    )


_SEQUENCES = 'u', 'delta', 'z'


def _laid_out(grad: Tensor, tensor: Tensor, is_sequence: bool) -> Tensor:
    """A gradient in the dtype of its tensor, and if that is a sequence in its layout, else contiguous."""
    if not is_sequence:
        return grad.to(tensor.dtype).contiguous()
    if grad.dtype == tensor.dtype and grad.stride() == tensor.stride():
        return grad
    like = torch.empty_like(tensor)
    return grad if grad.dtype == like.dtype and grad.stride() == like.stride() else like.copy_(grad)


_selective_scan_backward = torch.library.custom_op('vmamba::selective_scan_fused_backward', _backward, mutates_args=())


@_selective_scan_backward.register_fake
def _(grad_y, grad_last_state, u, delta, A, B, C, D, z, delta_bias, initial_state, states, delta_softplus, reverse):
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return tuple(
        u.new_empty(0) if t is None else torch.empty_like(t) if name in _SEQUENCES else t.new_empty(t.shape)
        for name, t in zip(Gradients._fields, tensors)
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.reverse, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[2])


def _gradients(
    backward: Callable[..., tuple[Tensor, ...]], ctx, grad_y: Optional[Tensor], grad_last_state: Optional[Tensor]
) -> tuple[Optional[Tensor], ...]:
    """Gradients of all inputs, made by `backward`: `_backward` or the operator of it."""
    *tensors, states = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    grads = backward(grad_y, grad_last_state, *tensors, states, ctx.delta_softplus, ctx.reverse)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads)), None, None, None, None


run_selective_scan = differentiable(
    _selective_scan, _forward, _selective_scan_backward, _backward, _setup_context, _gradients, results=2
)
