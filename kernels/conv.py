"""Mamba's causal depthwise convolution, and Vim's two: one along the sequence, one against it."""

from typing import Iterator, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_tensors, runs_on_triton, triton
from .fused.conv1d_plan import MAX_TAPS, empty_outputs

if triton is not None:
    from .fused.conv1d_operator import run_causal_conv1d

NUM_DIRECTIONS = 2
_ACTIVATIONS = None, 'silu', 'swish'


def bidirectional_conv1d(x: Tensor, weight: Tensor, bias: Tensor, silu: bool = False) -> Tensor:
    """Causal depthwise convolutions of a sequence in both directions.

    With w taps, and x zero outside of the sequence:

        u_{l,0} = bias[0] + sum_t weight[0, :, t] * x_{l - (w - 1) + t}
        u_{l,1} = bias[1] + sum_t weight[1, :, t] * x_{l + (w - 1) - t}

    Computed in fp32 (fp64 if x is fp64), by Triton for at most 4 taps. Differentiable in reverse mode in every tensor.

    Args:
        x: [B, L, D], in any floating dtype and with any strides.
        weight: [2, D, w].
        bias: [2, D].
        silu: Return silu(u).

    Returns:
        u [B, L, 2, D] in x's dtype, both directions in the sequence's order, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    check_tensors('bidirectional_conv1d', x=x, weight=weight, bias=bias)
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f'x must be a floating [B, L, D] tensor, got {tuple(x.shape)} {x.dtype}')
    dim = x.shape[-1]
    if weight.ndim != 3 or tuple(weight.shape[:2]) != (NUM_DIRECTIONS, dim) or weight.shape[2] == 0:
        raise ValueError(f'weight must be [2, {dim}, w] with w > 0, got {tuple(weight.shape)}')
    if tuple(bias.shape) != (NUM_DIRECTIONS, dim):
        raise ValueError(f'bias must be [2, {dim}], got {tuple(bias.shape)}')
    return _convolve(x, weight, bias, silu)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    seq_idx: Optional[Tensor] = None,
    initial_states: Optional[Tensor] = None,
    return_final_states: bool = False,
    final_states_out: Optional[Tensor] = None,
    activation: Optional[str] = None,
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """Causal depthwise convolution with the signature and layouts of causal_conv1d's `causal_conv1d_fn`.

    With w taps, x_{-1}, ..., x_{-(w - 1)} the columns of initial_states from the last to the first, or zero:

        out_l = activation(bias + sum_t weight[:, t] * x_{l - (w - 1) + t})

    Computed in fp32 (fp64 if x is fp64), by Triton for at most 4 taps; with seq_idx in plain PyTorch. Differentiable in
    reverse mode in every floating tensor.

    Args:
        x: [B, D, L], in any floating dtype and with any strides.
        weight: [D, w].
        bias: [D].
        seq_idx: Integers [B, L] that tell sequences within a row apart: a tap meets only positions with the number of
            the present one. Where it is negative, which is padding, out is zero.
        initial_states: What comes before x [B, D, w - 1]; not together with seq_idx.
        return_final_states: Also return the last w - 1 columns of initial_states and x; not together with seq_idx.
        final_states_out: Where to write these [B, D, w - 1]; without `return_final_states` it stays as it is.
        activation: None, 'silu' or 'swish', which is the same.

    Returns:
        out [B, D, L] in x's dtype and its order of dimensions in memory; with `return_final_states` also the final
        states [B, D, w - 1] in x's dtype.

    Raises:
        ValueError: If shapes, dtypes, devices or options do not fit together.
    """
    check_tensors(
        'causal_conv1d',
        x=x,
        weight=weight,
        bias=bias,
        seq_idx=seq_idx,
        initial_states=initial_states,
        final_states_out=final_states_out,
    )
    _check_causal(x, weight, bias, seq_idx, initial_states, return_final_states, final_states_out, activation)
    silu = activation is not None
    if seq_idx is not None:
        return _segmented_conv1d(x, weight, bias, seq_idx, silu)
    history = weight.shape[1] - 1
    if initial_states is not None:
        x = torch.cat([initial_states.mT, x.mT], dim=1).mT if x.stride(1) == 1 else torch.cat([initial_states, x], -1)
    out = _convolve(x.mT, weight[None], None if bias is None else bias[None], silu).squeeze(2).mT
    out = out if initial_states is None else out[..., history:]
    if not return_final_states:
        return out
    final_states = F.pad(x, (history - x.shape[-1], 0))  # a copy, cut or filled up at its beginning
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def _check_causal(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
    seq_idx: Optional[Tensor],
    initial_states: Optional[Tensor],
    return_final_states: bool,
    final_states_out: Optional[Tensor],
    activation: Optional[str],
) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f'x must be a floating [B, D, L] tensor, got {tuple(x.shape)} {x.dtype}')
    batch, dim, seqlen = x.shape
    if weight.ndim != 2 or weight.shape[0] != dim or weight.shape[1] == 0:
        raise ValueError(f'weight must be [{dim}, w] with w > 0, got {tuple(weight.shape)}')
    if bias is not None and tuple(bias.shape) != (dim,):
        raise ValueError(f'bias must be [{dim}], got {tuple(bias.shape)}')
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation must be None, 'silu' or 'swish', got {activation!r}")
    for name, states in (('initial_states', initial_states), ('final_states_out', final_states_out)):
        shape = batch, dim, weight.shape[1] - 1
        if states is not None and (tuple(states.shape) != shape or states.dtype != x.dtype):
            raise ValueError(f'{name} must be {list(shape)} {x.dtype}, got {tuple(states.shape)} {states.dtype}')
    if seq_idx is None:
        return
    if tuple(seq_idx.shape) != (batch, seqlen) or seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f'seq_idx must be integers [{batch}, {seqlen}], got {tuple(seq_idx.shape)} {seq_idx.dtype}')
    if initial_states is not None or return_final_states:
        given = 'initial_states' if initial_states is not None else 'return_final_states=True'
        raise ValueError(f'seq_idx cannot be combined with initial or final states, got {given}')


def _segmented_conv1d(x: Tensor, weight: Tensor, bias: Optional[Tensor], seq_idx: Tensor, silu: bool) -> Tensor:
    """`causal_conv1d` with `seq_idx`."""
    seqlen, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    x_wide, weight, seq_idx = x.to(wide), weight.to(wide), seq_idx.unsqueeze(1)
    out = torch.zeros_like(x_wide) if bias is None else bias.to(wide)[:, None].expand_as(x)
    for tap in range(weight.shape[1]):
        back = weight.shape[1] - 1 - tap
        if back < seqlen:
            same = seq_idx[..., back:] == seq_idx[..., : seqlen - back]
            met = torch.where(same, x_wide[..., : seqlen - back], 0)
            out = out + F.pad(weight[:, tap, None] * met, (back, 0))
    out = torch.where(seq_idx < 0, 0, F.silu(out) if silu else out)
    return torch.empty_like(x).copy_(out)


def _convolve(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
    """x [B, L, D], weight [K, D, w], bias [K, D] -> [B, L, K, D]"""
    if weight.shape[2] <= MAX_TAPS and runs_on_triton(x):
        return run_causal_conv1d(x, weight, bias, silu)
    return torch.ops.vmamba.causal_conv1d(x, weight, bias, silu)


@torch.library.custom_op('vmamba::causal_conv1d', mutates_args=())
def _causal_conv1d(x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
    u = _convolve_wide(x, weight, bias)
    return empty_outputs(x, weight.shape[0], x.dtype).copy_(F.silu(u, inplace=True) if silu else u)


@_causal_conv1d.register_fake
def _(x, weight, bias, silu):
    return empty_outputs(x, weight.shape[0], x.dtype)


def _convolve_wide(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """The convolution before its activation, in fp32 or fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    u = x.new_empty(*x.shape[:2], weight.shape[0], x.shape[2])
    u[:] = 0 if bias is None else bias
    taps = _taps_first(weight.to(wide))
    for direction, tap, to, source in _taps(x.shape[1], weight):
        u[:, to, direction].addcmul_(x[:, source], taps[direction, tap])
    return u


@torch.library.custom_op('vmamba::causal_conv1d_backward', mutates_args=())
def _causal_conv1d_backward(
    grad_u: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of weight and of bias, which is empty if there is none."""
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_u, x_wide = grad_u.to(wide), x.to(wide)
    if silu:
        u = _convolve_wide(x, weight, bias)
        gate = u.sigmoid()
        grad_u = grad_u * gate * (1 + u * (1 - gate))
    grad_x = torch.zeros_like(x, dtype=wide)
    grad_weight = torch.zeros_like(weight, dtype=wide, memory_format=torch.contiguous_format)
    taps = _taps_first(weight.to(wide))
    for direction, tap, to, source in _taps(x.shape[1], weight):
        grad = grad_u[:, to, direction]
        grad_x[:, source].addcmul_(grad, taps[direction, tap])
        grad_weight[direction, :, tap] = (grad * x_wide[:, source]).sum(dim=(0, 1))
    grad_bias = x.new_empty(0) if bias is None else grad_u.sum(dim=(0, 1)).to(bias.dtype)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias


@_causal_conv1d_backward.register_fake
def _(grad_u, x, weight, bias, silu):
    grad_weight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    grad_bias = x.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    return torch.empty_like(x), grad_weight, grad_bias


def _setup_context(ctx, inputs, output):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_u):
    tensors = ctx.saved_tensors  # once: under checkpointing each look makes them again
    *grads, grad_bias = torch.ops.vmamba.causal_conv1d_backward(grad_u, *tensors, ctx.silu)
    return *grads, None if tensors[2] is None else grad_bias, None


_causal_conv1d.register_autograd(_backward, setup_context=_setup_context)


def _taps_first(weight: Tensor) -> Tensor:
    """[K, D, w] -> [K, w, D]"""
    return weight.permute(0, 2, 1).contiguous()


def _taps(seqlen: int, weight: Tensor) -> Iterator[tuple[int, int, slice, slice]]:
    """Yields direction, tap, the positions that the tap writes and those that it reads."""
    directions, _, width = weight.shape
    for tap in range(width):
        back = width - 1 - tap
        if back < seqlen:
            late, early = slice(back, seqlen), slice(0, seqlen - back)
            for direction, (to, source) in zip(range(directions), ((late, early), (early, late))):
                yield direction, tap, to, source
