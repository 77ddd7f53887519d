"""Vim's causal depthwise convolutions: one along the sequence, one against it."""

from typing import Iterator

import torch
from torch import Tensor

NUM_DIRECTIONS = 2


def bidirectional_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Causal depthwise convolutions of a sequence in both directions.

    With w taps, and x zero outside of the sequence:

        u_{l,0} = bias[0] + sum_t weight[0, :, t] * x_{l - (w - 1) + t}
        u_{l,1} = bias[1] + sum_t weight[1, :, t] * x_{l + (w - 1) - t}

    Differentiable in every argument.

    Args:
        x: [B, L, D], in any floating dtype.
        weight: [2, D, w].
        bias: [2, D].

    Returns:
        u [B, L, 2, D] in x's dtype, both directions in the sequence's order, contiguous.

    Raises:
        ValueError: If shapes or dtypes do not fit together.
    """
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f'x must be a floating [B, L, D] tensor, got {tuple(x.shape)} {x.dtype}')
    dim = x.shape[-1]
    if weight.ndim != 3 or tuple(weight.shape[:2]) != (NUM_DIRECTIONS, dim) or weight.shape[2] == 0:
        raise ValueError(f'weight must be [2, {dim}, w] with w > 0, got {tuple(weight.shape)}')
    if tuple(bias.shape) != (NUM_DIRECTIONS, dim):
        raise ValueError(f'bias must be [2, {dim}], got {tuple(bias.shape)}')
    return torch.ops.vmamba.bidirectional_conv1d(x, weight, bias)


@torch.library.custom_op('vmamba::bidirectional_conv1d', mutates_args=())
def _bidirectional_conv1d(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    taps = weight.to(x.dtype).permute(0, 2, 1).contiguous()  # [2, D, w] -> [2, w, D]
    u = x.new_empty(x.shape[0], x.shape[1], NUM_DIRECTIONS, x.shape[2])
    u[:] = bias
    for direction, tap, to, source in _taps(x.shape[1], weight.shape[2]):
        u[:, to, direction].addcmul_(x[:, source], taps[direction, tap])
    return u


@_bidirectional_conv1d.register_fake
def _(x, weight, bias):
    return x.new_empty(x.shape[0], x.shape[1], NUM_DIRECTIONS, x.shape[2])


@torch.library.custom_op('vmamba::bidirectional_conv1d_backward', mutates_args=())
def _bidirectional_conv1d_backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_u, x_wide = grad_u.to(wide), x.to(wide)
    grad_x = torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format)
    grad_weight = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)
    taps = weight.to(wide).permute(0, 2, 1).contiguous()  # [2, D, w] -> [2, w, D]
    for direction, tap, to, source in _taps(x.shape[1], weight.shape[2]):
        grad = grad_u[:, to, direction]
        grad_x[:, source].addcmul_(grad, taps[direction, tap])
        grad_weight[direction, :, tap] = (grad * x_wide[:, source]).sum(dim=(0, 1))
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_u.sum(dim=(0, 1)).to(bias.dtype)


@_bidirectional_conv1d_backward.register_fake
def _(grad_u, *tensors):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_u):
    return torch.ops.vmamba.bidirectional_conv1d_backward(grad_u, *ctx.saved_tensors)


_bidirectional_conv1d.register_autograd(_backward, setup_context=_setup_context)


def _taps(seqlen: int, width: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Yields direction, tap, the positions that the tap writes and those that it reads."""
    for tap in range(width):
        back = width - 1 - tap
        if back < seqlen:
            late, early = slice(back, seqlen), slice(0, seqlen - back)
            yield 0, tap, late, early
            yield 1, tap, early, late
