"""The selective scan in plain PyTorch: fast on a CPU, right on any device.

Works on channels-last tensors with the channels split into groups that share B and C:
u, delta [batch, L, G, D/G], B, C [batch, L, G, N], A [G, N, D/G], states [batch, G, N, D/G], all in one dtype.
Memory is linear in L and independent of N: states exist for one bounded segment of L at a time, and the backward
pass recomputes them from the state at each segment's start.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .recurrence import linear_recurrence_, segments

_LOG2_E = math.log2(math.e)  # torch's vectorised exp2 is about three times as fast as its exp


class ScanGradients(NamedTuple):
    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    initial_state: Tensor


def scan_forward(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Computes h_l = exp(delta_l * A) * h_{l-1} + delta_l * B_l * u_l and y_l = <C_l, h_l>.

    Returns:
        y [batch, L, G, D/G] and the state after the last step.
    """
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    for part in segments(u.shape[1], state.numel()):
        _, states = _states(u[:, part], delta[:, part], A, B[:, part], state)
        y[:, part] = _contract_states(C[:, part], states[:, 1:])
        state = states[:, -1].clone()
    return y, state


def scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
) -> ScanGradients:
    """Gradients of `scan_forward` by the adjoint recurrence g_l = C_l * grad_y_l + exp(delta_{l+1} * A) * g_{l+1}.

    Args:
        grad_y: Gradient of y.
        grad_state: Gradient of the state after the last step.
        u, delta, A, B, C, state: The arguments of `scan_forward`.
    """
    parts = segments(u.shape[1], state.numel())
    starts = [state]
    for part in parts[:-1]:
        _, states = _states(u[:, part], delta[:, part], A, B[:, part], starts[-1])
        starts.append(states[:, -1].clone())

    contiguous = {'memory_format': torch.contiguous_format}
    grad_u, grad_delta = torch.empty_like(u, **contiguous), torch.empty_like(delta, **contiguous)
    grad_A = torch.zeros_like(A, **contiguous)
    grad_B, grad_C = torch.empty_like(B, **contiguous), torch.empty_like(C, **contiguous)
    for part, start in zip(reversed(parts), reversed(starts)):
        u_part, delta_part, B_part = u[:, part], delta[:, part], B[:, part]
        decay, states = _states(u_part, delta_part, A, B_part, start)
        grad_C[:, part] = _contract_channels(states[:, 1:], grad_y[:, part])

        adjoint = C[:, part].unsqueeze(-1) * grad_y[:, part].unsqueeze(-2)
        linear_recurrence_(decay[:, 1:].flatten(2), adjoint.flatten(2), grad_state.flatten(1), reverse=True)
        grad_state = decay[:, 0] * adjoint[:, 0]

        grad_B[:, part] = _contract_channels(adjoint, delta_part * u_part)
        grad_input = _contract_states(B_part, adjoint)
        torch.mul(grad_input, delta_part, out=grad_u[:, part])

        grad_exponent = adjoint.mul_(states[:, :-1]).mul_(decay[:, :-1])
        grad_delta[:, part] = torch.sum(grad_exponent * A, dim=-2).addcmul_(grad_input, u_part)
        grad_A += grad_exponent.mul_(delta_part.unsqueeze(-2)).sum(dim=(0, 1))
    return ScanGradients(grad_u, grad_delta, grad_A, grad_B, grad_C, grad_state)


def _states(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """States of one segment of S steps.

    Returns:
        decay [batch, S + 1, G, N, D/G], whose last entry is one (so that `decay[:, 1:]` are the adjoint's decays),
        and states [batch, S + 1, G, N, D/G], whose first entry is the state before the segment.
    """
    batch, steps = u.shape[:2]
    decay = u.new_empty(batch, steps + 1, *A.shape)
    torch.mul(delta.unsqueeze(-2), A * _LOG2_E, out=decay[:, :-1])
    decay[:, :-1].exp2_()
    decay[:, -1] = 1
    states = torch.empty_like(decay)
    states[:, 0] = state
    torch.mul(B.unsqueeze(-1), (delta * u).unsqueeze(-2), out=states[:, 1:])
    linear_recurrence_(decay[:, :-1].flatten(2), states[:, 1:].flatten(2), state.flatten(1))
    return decay, states


def _contract_states(weight: Tensor, states: Tensor) -> Tensor:
    """sum_n weight[..., n] * states[..., n, d]"""
    if weight.shape[-1] == 1:  # a product of 1x1 matrices has far more overhead than arithmetic
        return weight * states.squeeze(-2)
    return torch.matmul(weight.unsqueeze(-2), states).squeeze(-2)


def _contract_channels(states: Tensor, channels: Tensor) -> Tensor:
    """sum_d states[..., n, d] * channels[..., d]"""
    if states.shape[-2] == 1:
        return (states * channels.unsqueeze(-2)).sum(dim=-1)
    return torch.matmul(states, channels.unsqueeze(-1)).squeeze(-1)
