"""The selective scan in plain PyTorch: fast on a CPU, right on any device.

Works on channels-last tensors with the channels split into groups that share B and C:
u, delta [batch, L, G, D/G], B, C [batch, L, G, N], A [G, N, D/G], states [batch, G, N, D/G], all in one dtype.
Memory is linear in L and independent of N: states exist for one bounded segment of L at a time, and the backward
pass recomputes them from the state at each segment's start.
"""

import math
from typing import Iterator, NamedTuple

import torch
from torch import Tensor

from .recurrence import blocks, linear_recurrence_
from .scratch import scratch

_LOG2_E = math.log2(math.e)  # torch's vectorised exp2 is three times as fast as its exp


class ScanGradients(NamedTuple):
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor


def scan_forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, delta_softplus: bool
) -> tuple[Tensor, Tensor]:
    """Computes h_l = exp(delta_l * A) * h_{l-1} + delta_l * B_l * u_l and y_l = <C_l, h_l>.

    Args:
        u, delta, A, B, C: See the module.
        state: State before the first step.
        delta_softplus: Apply softplus to delta first.

    Returns:
        y [batch, L, G, D/G], in memory that the thread's next call overwrites, and the state after the last step.
    """
    y = scratch('y', u, u.shape)
    last_state = torch.empty_like(state)
    A_log2 = A * _LOG2_E
    batches, parts = blocks(*u.shape[:2], A.numel())
    for rows in batches:
        entries = (u[rows], delta[rows], A_log2, B[rows], state[rows], parts, delta_softplus)
        for part, states in _walk_parts(*entries):
            _contract_states(C[rows, part], states, out=y[rows, part])
        last_state[rows] = states[:, -1]
    return y, last_state


def scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    delta_softplus: bool,
) -> ScanGradients:
    """Gradients of `scan_forward` by the adjoint recurrence g_l = C_l * grad_y_l + exp(delta_{l+1} * A) * g_{l+1}.

    Args:
        grad_y: Gradient of y.
        grad_state: Gradient of the state after the last step.
        u, delta, A, B, C, state, delta_softplus: The arguments of `scan_forward`.
    """
    grad_u, grad_delta, grad_B, grad_C = (
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (u, delta, B, C)
    )
    grad_A = torch.zeros_like(A, memory_format=torch.contiguous_format)
    grad_initial = torch.empty_like(state)
    A_log2 = A * _LOG2_E
    batches, parts = blocks(*u.shape[:2], A.numel())
    for rows in batches:
        starts = [state[rows]]
        entries = (u[rows], delta[rows], A_log2, B[rows], state[rows], parts[:-1], delta_softplus)
        starts += [states[:, -1].clone() for _, states in _walk_parts(*entries)]
        grad_carried = grad_state[rows]
        for part, start in zip(reversed(parts), reversed(starts)):
            block = rows, part
            u_part, B_part, grad_y_part = u[block], B[block], grad_y[block]
            step = _softplus(delta[block]) if delta_softplus else delta[block]
            # One step more than the part: the state before it, and a decay of one into the step after it.
            decay, states, products, adjoint = _buffers(4, step.shape[1] + 1, start)
            states[:, 0] = start
            decay[:, -1] = 1
            _states(u_part, step, A_log2, B_part, start, decay[:, :-1], states[:, 1:], products[:, :-1])
            _contract_channels(states[:, 1:], grad_y_part, out=grad_C[block])

            adjoint = adjoint[:, 1:]
            torch.mul(C[block].unsqueeze(-1), grad_y_part.unsqueeze(-2), out=adjoint)
            linear_recurrence_(decay[:, 1:], adjoint, grad_carried, products[:, 1:], reverse=True)
            grad_carried = decay[:, 0] * adjoint[:, 0]

            _contract_channels(adjoint, step * u_part, out=grad_B[block])
            grad_input = torch.empty_like(step, memory_format=torch.contiguous_format)
            _contract_states(B_part, adjoint, out=grad_input)
            torch.mul(grad_input, step, out=grad_u[block])

            grad_exponent = adjoint.mul_(states[:, :-1]).mul_(decay[:, :-1])
            grad_step = torch.mul(grad_exponent, A, out=products[:, 1:]).sum(dim=-2).addcmul_(grad_input, u_part)
            if delta_softplus:
                grad_step.mul_(torch.sigmoid(delta[block]))
            grad_delta[block] = grad_step
            grad_A += grad_exponent.mul_(step.unsqueeze(-2)).sum(dim=(0, 1))
        grad_initial[rows] = grad_carried
    return ScanGradients(grad_u, grad_delta, grad_A, grad_B, grad_C, grad_initial)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)); on a CPU torch computes it as logaddexp three times as fast as its softplus, as exactly."""
    return torch.logaddexp(x, x.new_zeros(()), out=scratch('step', x, x.shape))


def _buffers(count: int, steps: int, state: Tensor) -> Tensor:
    """`count` buffers [batch, steps, G, N, D/G] in one piece of scratch memory."""
    batch, *sizes = state.shape
    return scratch('states', state, (count, batch, steps, *sizes))


def _walk_parts(
    u: Tensor,
    delta: Tensor,
    A_log2: Tensor,
    B: Tensor,
    state: Tensor,
    parts: list[slice],
    delta_softplus: bool,
) -> Iterator[tuple[slice, Tensor]]:
    """Yields each part of L with its states [batch, S, G, N, D/G], which are overwritten by the next part's."""
    for part in parts:
        step = _softplus(delta[:, part]) if delta_softplus else delta[:, part]
        decay, states = _buffers(2, step.shape[1], state)
        _states(u[:, part], step, A_log2, B[:, part], state, decay, states, products=decay)
        state = states[:, -1].clone()
        yield part, states


def _states(
    u: Tensor,
    step: Tensor,
    A_log2: Tensor,
    B: Tensor,
    state: Tensor,
    decay: Tensor,
    states: Tensor,
    products: Tensor,
) -> None:
    """Fills decay and states [batch, S, G, N, D/G] of one segment; its decays are lost if `products` is decay."""
    torch.mul(step.unsqueeze(-2), A_log2, out=decay).exp2_()
    step_u = torch.mul(step, u, out=scratch('step_u', u, u.shape))
    torch.mul(B.unsqueeze(-1), step_u.unsqueeze(-2), out=states)
    linear_recurrence_(decay, states, state, products)


def _contract_states(weight: Tensor, states: Tensor, out: Tensor) -> None:
    """out[..., d] = sum_n weight[..., n] * states[..., n, d]"""
    if weight.shape[-1] == 1:
        torch.mul(weight, states.squeeze(-2), out=out)
    elif _is_small(states):
        torch.sum(weight.unsqueeze(-1) * states, dim=-2, out=out)
    else:
        out.copy_(torch.matmul(weight.unsqueeze(-2), states).squeeze(-2))


def _contract_channels(states: Tensor, channels: Tensor, out: Tensor) -> None:
    """out[..., n] = sum_d states[..., n, d] * channels[..., d]"""
    if _is_small(states):
        torch.sum(states * channels.unsqueeze(-2), dim=-1, out=out)
    else:
        out.copy_(torch.matmul(states, channels.unsqueeze(-1)).squeeze(-1))


def _is_small(states: Tensor) -> bool:
    """Whether starting a product with each [N, D/G] matrix takes longer than the arithmetic."""
    return states.shape[-2] * states.shape[-1] < 2**11
