"""The selective scan of Mamba (S6) along one dimension.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, https://arxiv.org/abs/2312.00752
"""

from math import prod
from typing import Any, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import chunked
from .._check import check, check_that
from .._launch import runs_on_triton
from .._operator import Operator
from .launch import MAX_STATES, Scan, empty_targets, scan_backward, scan_forward, states_shape

__all__ = ['selective_scan']


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    delta_bias: Optional[Tensor] = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Optional[Tensor] = None,
    reverse: bool = False,
    out_dtype: Optional[torch.dtype] = None,
) -> Union[Tensor, Tuple[Tensor, Tensor]]:
    """Selective scan with the signature and layouts of mamba_ssm's `selective_scan_fn`.

    With delta' = softplus(delta + delta_bias) (each part optional), for every channel d and state n:

        h_l = exp(delta'_l * A) * h_{l-1} + delta'_l * B_l * u_l,    y_l = (<C_l, h_l> + D * u_l) * silu(z_l)

    The state, A, D and delta_bias are kept in fp32 (fp64 if u is fp64). Triton supports 1 to 64 states; otherwise
    plain PyTorch runs. Differentiable in reverse mode in every tensor argument.

    Args:
        u: Input [batch, dim, L], in any floating dtype.
        delta: Step size, [batch, dim, L], or [batch, dim / g, L] where g neighbouring channels share it.
        A: [dim, N], negative for a stable recurrence.
        B: Input projection, [dim, N], [batch, N, L] or [batch, G, N, L] for G groups of channels.
        C: Output projection, laid out like B.
        D: Skip connection [dim].
        z: Gate [batch, dim, L].
        delta_bias: [dim].
        delta_softplus: Apply softplus to the step size.
        return_last_state: Also return the state after the last step.
        initial_state: State before the first step [batch, dim, N], zero by default.
        reverse: Walk from the last position to the first; the output stays in order.
        out_dtype: dtype of y, by default u's.

    Returns:
        y [batch, dim, L] in u's memory layout; with `return_last_state` also the last state [batch, dim, N] in fp32.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, out_dtype)
    batch, dim, seqlen = u.shape
    if delta.shape[1] != dim:
        delta = delta.repeat_interleave(dim // delta.shape[1], dim=1)
    B, C = (_per_group(tensor, batch, seqlen) for tensor in (B, C))
    groups = max(B.shape[1], C.shape[1])
    B, C = (
        tensor if tensor.shape[1] == groups else tensor.repeat_interleave(groups // tensor.shape[1], dim=1)
        for tensor in (B, C)
    )
    triton = 0 < A.shape[1] <= MAX_STATES and runs_on_triton(u)
    out_dtype = out_dtype or u.dtype
    y, last_state = _scan(
        u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, out_dtype, triton
    )
    return (y, last_state) if return_last_state else y


def _per_group(tensor: Tensor, batch: int, seqlen: int) -> Tensor:
    """B or C as [batch, G, N, L]."""
    if tensor.ndim == 2:
        return tensor[None, :, :, None].expand(batch, -1, -1, seqlen)
    return tensor[:, None] if tensor.ndim == 3 else tensor


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    delta_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    out_dtype: Optional[torch.dtype],
) -> None:
    floating = out_dtype is None or out_dtype.is_floating_point
    check_that(floating, f'selective_scan: out_dtype must be a floating dtype, got {out_dtype}')
    specs = 'dim N | batch N L | batch {} N L'
    check(
        'selective_scan',
        u=(u, 'batch dim L>0'),
        A=(A, 'dim N'),
        delta=(delta, 'batch shared L'),
        B=(B, specs.format('G')),
        C=(C, specs.format('H')),
        D=(D, 'dim'),
        z=(z, 'batch dim L'),
        delta_bias=(delta_bias, 'dim'),
        initial_state=(initial_state, 'batch dim N'),
    )
    dim = u.shape[1]
    groups = {name: tensor.shape[1] for name, tensor in (('B', B), ('C', C)) if tensor.ndim == 4}
    for name, number in {'delta': delta.shape[1], **groups}.items():
        divides = number > 0 and dim % number == 0
        check_that(
            divides, f'selective_scan: dimension 1 of {name} must be a divisor of the {dim} channels, got {number}'
        )
    fit = not groups or max(groups.values()) % min(groups.values()) == 0
    found = list(groups.values())
    check_that(fit, f'selective_scan: of the groups of B and C one number must divide the other, got {found}')


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
    triton: bool,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    """y, the last state, and the states that the backward pass starts from."""
    y = torch.empty_like(u, dtype=out_dtype)
    if not triton:
        last_state = _plain_forward(y, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)
        return y, last_state, u.new_empty(0, dtype=torch.float32)
    if u.shape[0] == 0:
        return y, A.new_empty(0, *A.shape, dtype=torch.float32), _empty_states(u, A, save)
    scan = _prepare(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)
    last_state, states = scan_forward(scan, y, save)
    return y, last_state, states if save else _empty_states(u, A, save)


def _backward(grads: tuple, inputs: tuple, saved: tuple) -> Sequence[Optional[Tensor]]:
    (grad_y, grad_last), (*arguments, _, triton), (states,) = grads, inputs, saved
    u, *_ = tensors = arguments[:9]
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    if not triton:
        return _plain_backward(grad_y, grad_last, *arguments)
    if u.shape[0] == 0:
        return [None if tensor is None else torch.zeros_like(tensor) for tensor in tensors]
    grad_last = None if grad_last is None else grad_last.float().contiguous()
    scan = _prepare(*arguments)
    targets = empty_targets(scan)
    grads = scan_backward(scan, grad_y, grad_last, states, targets)
    dim, dstate = scan.A.shape
    grad_initial = grads.adjoints[:, -1].mT
    grad_D, grad_bias, grad_A = grads.parameters.sum(dim=0).split([dim, dim, dim * dstate])
    parameters = grad_A.view(dim, dstate), targets.B, targets.C, grad_D, targets.z, grad_bias, grad_initial
    return [None if tensor is None else grad for tensor, grad in zip(tensors, (targets.u, targets.delta, *parameters))]


def _like(
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
    triton: bool,
    save: bool,
) -> Tuple[Tensor, Tensor, Tensor]:
    wide = torch.float32 if triton else torch.promote_types(u.dtype, torch.float32)
    states = _empty_states(u, A, save and triton)
    return torch.empty_like(u, dtype=out_dtype), u.new_empty(u.shape[0], *A.shape, dtype=wide), states


def _empty_states(u: Tensor, A: Tensor, save: bool) -> Tensor:
    return u.new_empty(states_shape(u, A) if save else (0,), dtype=torch.float32)


def _macs(u: Sequence[int], delta: Any, A: Sequence[int], B: Any, C: Any, D: Any, z: Any, *others: Any) -> int:
    """9 * L * D * N, the skip connection and the gate L * D each, as in the official tables."""
    return prod(u) * (9 * A[1] + (D is not None) + (z is not None))


def _backward_macs(*shapes: Any) -> int:
    """The states again, and the adjoint recurrence at twice the cost."""
    return 3 * _macs(*shapes)


_scan = Operator('selective_scan', _forward, _backward, _like, results=2, macs=_macs, backward_macs=_backward_macs)


def _prepare(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    delta_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    softplus: bool,
    reverse: bool,
) -> Scan:
    """The scan as its kernels take it."""
    D, delta_bias, initial = (None if t is None else t.contiguous() for t in (D, delta_bias, initial_state))
    return Scan(u, delta, A.float().contiguous(), B, C, D, z, delta_bias, initial, softplus, reverse)


def _plain_forward(
    y: Tensor,
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
) -> Tensor:
    """Fills y; returns the last state."""
    core = _core_arguments(u, delta, A, B, C, delta_bias, initial_state)
    out = chunked.scratch('y', core[0], core[0].shape)
    last_state = chunked.scan_forward(*core, delta_softplus, out, reverse)
    out = _to_sequence(out)
    if D is not None:
        out.addcmul_(u.to(out.dtype), D.to(out.dtype).unsqueeze(-1))
    if z is not None:
        out.mul_(F.silu(z.to(out.dtype)))
    y.copy_(out)
    return _to_state(last_state).clone()  # autograd refuses in-place changes of a view that a function returns


def _plain_backward(
    grad_y: Tensor,
    grad_last: Optional[Tensor],
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
) -> Sequence[Optional[Tensor]]:
    core = _core_arguments(u, delta, A, B, C, delta_bias, initial_state)
    wide = core[0].dtype
    wide_u, grad_y = u.to(wide), grad_y.to(wide)
    grad_D = grad_z = grad_delta_bias = None
    if z is not None:
        y = chunked.scratch('y', core[0], core[0].shape)
        chunked.scan_forward(*core, delta_softplus, y, reverse)
        y = _to_sequence(y)
        if D is not None:
            y.addcmul_(wide_u, D.to(wide).unsqueeze(-1))
        wide_z = z.to(wide)
        gate = torch.sigmoid(wide_z)
        grad_z = grad_y * y * gate * (1 + wide_z * (1 - gate))
        grad_y = grad_y * wide_z * gate
    groups = B.shape[1]
    if grad_last is None:
        grad_state = torch.zeros_like(core[-1])
    else:
        grad_state = grad_last.to(wide).unflatten(1, (groups, -1)).transpose(-2, -1)
    grad_u = torch.empty_like(core[0])
    grads = chunked.scan_backward(_to_groups(grad_y, groups), grad_state, *core, delta_softplus, grad_u, reverse)
    grad_u, grad_delta = _to_sequence(grad_u), _to_sequence(core[1].grad)
    if D is not None:
        grad_D = (grad_y * wide_u).sum(dim=(0, 2))
        grad_u.addcmul_(grad_y, D.to(wide).unsqueeze(-1))
    if delta_bias is not None:
        grad_delta_bias = grad_delta.sum(dim=(0, 2))
    grad_A = grads.A.transpose(-2, -1).flatten(0, 1)
    grad_B, grad_C = (grad.permute(0, 2, 3, 1) for grad in (grads.B, grads.C))  # [batch, L, G, N] -> [batch, G, N, L]
    grad_initial = None if initial_state is None else _to_state(grads.initial_state)
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_delta_bias, grad_initial


def _core_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
) -> Tuple[Tensor, chunked.GivenSteps, Tensor, Tensor, Tensor, Tensor]:
    """What `chunked.scan_forward` takes."""
    wide = torch.promote_types(u.dtype, torch.float32)
    groups = B.shape[1]
    delta = delta.to(wide)
    if delta_bias is not None:
        delta = delta + delta_bias.to(wide).unsqueeze(-1)
    A = A.to(wide).unflatten(0, (groups, -1)).transpose(-2, -1).contiguous()  # [dim, N] -> [G, N, dim/G]
    if initial_state is None:
        state = u.new_zeros(u.shape[0], *A.shape, dtype=wide)
    else:
        state = initial_state.to(wide).unflatten(1, (groups, -1)).transpose(-2, -1).contiguous()
    B, C = (tensor.to(wide).permute(0, 3, 1, 2).contiguous() for tensor in (B, C))  # -> [batch, L, G, N]
    u, delta = (_to_groups(tensor.to(wide), groups) for tensor in (u, delta))
    return u, chunked.GivenSteps(delta), A, B, C, state


def _to_groups(sequence: Tensor, groups: int) -> Tensor:
    """[batch, dim, L] -> a contiguous [batch, L, G, dim/G]"""
    return sequence.transpose(1, 2).unflatten(-1, (groups, -1)).contiguous()


def _to_sequence(grouped: Tensor) -> Tensor:
    """[batch, L, G, dim/G] -> [batch, dim, L]"""
    return grouped.flatten(2).transpose(1, 2)


def _to_state(grouped: Tensor) -> Tensor:
    """[batch, G, N, dim/G] -> a new contiguous [batch, dim, N]"""
    return grouped.transpose(-2, -1).clone(memory_format=torch.contiguous_format).flatten(1, 2)
