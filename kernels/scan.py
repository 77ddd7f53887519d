"""The selective scan of Mamba (S6) along one dimension.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, https://arxiv.org/abs/2312.00752
"""

from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_tensors, runs_on_triton, triton
from .chunked import scan_backward, scan_forward

if triton is not None:
    from .fused.scan import run_selective_scan


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
) -> Union[Tensor, tuple[Tensor, Tensor]]:
    """Selective scan with the signature and layouts of mamba_ssm's `selective_scan_fn`.

    With delta' = softplus(delta + delta_bias) (each part optional), for every channel d and state n:

        h_l = exp(delta'_l * A) * h_{l-1} + delta'_l * B_l * u_l,    y_l = (<C_l, h_l> + D * u_l) * silu(z_l)

    The state, A, D and delta_bias are kept in fp32 (fp64 if u is fp64). Differentiable in reverse mode in every
    tensor argument.

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
        y [batch, dim, L] in u's memory layout; with `return_last_state` also the last state
        [batch, dim, N] in fp32.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
    """
    check_tensors(
        'selective_scan',
        u=u,
        delta=delta,
        A=A,
        B=B,
        C=C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        initial_state=initial_state,
    )
    _check(u, delta, A, B, C, D, z, delta_bias, initial_state, out_dtype)
    B, C = (tensor[:, None] if tensor.ndim == 3 else tensor for tensor in (B, C))
    tensors = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if runs_on_triton(u):
        y, last_state = run_selective_scan(*tensors, delta_softplus, reverse, out_dtype or u.dtype)
    else:
        y, last_state = _plain_scan(*tensors, delta_softplus, reverse, out_dtype)
    return (y, last_state) if return_last_state else y


def _plain_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *others: Union[Tensor, bool, torch.dtype, None]
) -> tuple[Tensor, Tensor]:
    """The operator on one delta a channel, and on B and C of as many groups."""
    dim = u.shape[1]
    if delta.shape[1] != dim:
        delta = delta.repeat_interleave(dim // delta.shape[1], dim=1)
    B, C = (_per_group(tensor, u) for tensor in (B, C))
    groups = max(B.shape[1], C.shape[1])
    B, C = (tensor.repeat_interleave(groups // tensor.shape[1], dim=1) for tensor in (B, C))
    return torch.ops.vmamba.selective_scan(u, delta, A, B, C, *others)


def _per_group(tensor: Tensor, u: Tensor) -> Tensor:
    """B or C as [batch, G, N, L]."""
    if tensor.ndim == 2:
        return tensor[None, :, :, None].expand(u.shape[0], -1, -1, u.shape[2])
    return tensor


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
    names = ('u', 'delta', 'A', 'B', 'C', 'D', 'z', 'delta_bias', 'initial_state')
    for name, tensor in zip(names, (u, delta, A, B, C, D, z, delta_bias, initial_state)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f'{name} must be a real floating tensor, got {tensor.dtype}')
    if out_dtype is not None and not out_dtype.is_floating_point:
        raise ValueError(f'out_dtype must be a floating dtype, got {out_dtype}')
    if u.ndim != 3:
        raise ValueError(f'u must be [batch, dim, L], got {tuple(u.shape)}')
    batch, dim, seqlen = u.shape
    if seqlen == 0:
        raise ValueError('u must hold at least one position, got L = 0')
    if A.ndim != 2 or A.shape[0] != dim:
        raise ValueError(f'A must be [dim={dim}, N], got {tuple(A.shape)}')
    dstate = A.shape[1]
    if delta.ndim != 3 or (delta.shape[0], delta.shape[2]) != (batch, seqlen) or not _divides(delta.shape[1], dim):
        raise ValueError(f'delta must be [{batch}, {dim} or a divisor of it, {seqlen}], got {tuple(delta.shape)}')
    for name, tensor in (('B', B), ('C', C)):
        constant = tuple(tensor.shape) == (dim, dstate)
        shared = tuple(tensor.shape) == (batch, dstate, seqlen)
        grouped = tensor.ndim == 4 and (tensor.shape[0], *tensor.shape[2:]) == (batch, dstate, seqlen)
        if not (constant or shared or (grouped and _divides(tensor.shape[1], dim))):
            raise ValueError(
                f'{name} must be [{dim}, {dstate}], [{batch}, {dstate}, {seqlen}] or [{batch}, G, {dstate}, {seqlen}] '
                f'with G a divisor of {dim}, got {tuple(tensor.shape)}'
            )
    groups = [tensor.shape[1] for tensor in (B, C) if tensor.ndim == 4]
    if groups and max(groups) % min(groups):
        raise ValueError(f'of the groups of B and C one number must divide the other, got {groups}')
    expected = {'D': (dim,), 'z': (batch, dim, seqlen), 'delta_bias': (dim,), 'initial_state': (batch, dim, dstate)}
    for (name, shape), tensor in zip(expected.items(), (D, z, delta_bias, initial_state)):
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f'{name} must be {list(shape)}, got {tuple(tensor.shape)}')


def _divides(groups: int, dim: int) -> bool:
    return groups > 0 and dim % groups == 0


@torch.library.custom_op('vmamba::selective_scan', mutates_args=())
def _selective_scan(
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
    out_dtype: Optional[torch.dtype] = None,
) -> tuple[Tensor, Tensor]:
    core = _core_arguments(u, delta, A, B, C, delta_bias, initial_state, reverse)
    y, last_state = scan_forward(*core, delta_softplus)
    y = _to_sequence(y, reverse)
    if D is not None:
        y.addcmul_(u.to(y.dtype), D.to(y.dtype).unsqueeze(-1))
    if z is not None:
        y.mul_(F.silu(z.to(y.dtype)))
    return torch.empty_like(u, dtype=out_dtype or u.dtype).copy_(y), _to_state(last_state)


@_selective_scan.register_fake
def _(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse, out_dtype=None):
    dtype = torch.promote_types(u.dtype, torch.float32)
    return torch.empty_like(u, dtype=out_dtype or u.dtype), u.new_empty(u.shape[0], *A.shape, dtype=dtype)


@torch.library.custom_op('vmamba::selective_scan_backward', mutates_args=())
def _selective_scan_backward(
    grad_y: Tensor,
    grad_last_state: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of the tensor arguments; an absent argument has an empty one."""
    core = _core_arguments(u, delta, A, B, C, delta_bias, initial_state, reverse)
    wide = core[0].dtype
    wide_u, grad_y = u.to(wide), grad_y.to(wide)
    grad_D, grad_z, grad_delta_bias, grad_initial = (u.new_empty(0) for _ in range(4))

    if z is not None:
        y = _to_sequence(scan_forward(*core, delta_softplus)[0], reverse)
        if D is not None:
            y.addcmul_(wide_u, D.to(wide).unsqueeze(-1))
        wide_z = z.to(wide)
        gate = torch.sigmoid(wide_z)
        grad_z = torch.empty_like(z).copy_(grad_y * y * gate * (1 + wide_z * (1 - gate)))
        grad_y = grad_y * wide_z * gate
    groups = B.shape[1]
    state_gradient = grad_last_state.to(wide).unflatten(1, (groups, -1)).transpose(-2, -1)
    grads = scan_backward(_to_groups(grad_y, groups, reverse), state_gradient, *core, delta_softplus)

    grad_u, grad_delta = _to_sequence(grads.u, reverse), _to_sequence(grads.delta, reverse)
    if D is not None:
        grad_D = (grad_y * wide_u).sum(dim=(0, 2)).to(D.dtype)
        grad_u.addcmul_(grad_y, D.to(wide).unsqueeze(-1))
    if delta_bias is not None:
        grad_delta_bias = grad_delta.sum(dim=(0, 2)).to(delta_bias.dtype)
    if initial_state is not None:
        grad_initial = torch.empty_like(initial_state).copy_(_to_state(grads.initial_state))
    return (
        torch.empty_like(u).copy_(grad_u),
        torch.empty_like(delta).copy_(grad_delta),
        torch.empty_like(A).copy_(grads.A.transpose(-2, -1).flatten(0, 1)),
        torch.empty_like(B).copy_(_to_projection(grads.B, reverse)),
        torch.empty_like(C).copy_(_to_projection(grads.C, reverse)),
        grad_D,
        grad_z,
        grad_delta_bias,
        grad_initial,
    )


@_selective_scan_backward.register_fake
def _(grad_y, grad_last_state, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    optional = (D, z, delta_bias, initial_state)
    return (
        *(torch.empty_like(tensor) for tensor in (u, delta, A, B, C)),
        *(u.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in optional),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y, grad_last_state):
    tensors = ctx.saved_tensors
    grads = torch.ops.vmamba.selective_scan_backward(grad_y, grad_last_state, *tensors, ctx.delta_softplus, ctx.reverse)
    return *(None if tensor is None else grad for tensor, grad in zip(tensors, grads)), None, None, None


_selective_scan.register_autograd(_backward, setup_context=_setup_context)


def _core_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    delta_bias: Optional[Tensor],
    initial_state: Optional[Tensor],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of `scan_forward`, in walking order."""
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
    B, C = (tensor.to(wide).permute(0, 3, 1, 2) for tensor in (B, C))  # [batch, G, N, L] -> [batch, L, G, N]
    B, C = (tensor.flip(1) if reverse else tensor.contiguous() for tensor in (B, C))
    u, delta = (_to_groups(tensor.to(wide), groups, reverse) for tensor in (u, delta))
    return u, delta, A, B, C, state


def _to_groups(sequence: Tensor, groups: int, reverse: bool) -> Tensor:
    """[batch, dim, L] -> [batch, L, G, dim/G], in walking order."""
    grouped = sequence.transpose(1, 2).unflatten(-1, (groups, -1))
    return grouped.flip(1) if reverse else grouped.contiguous()


def _to_sequence(grouped: Tensor, reverse: bool) -> Tensor:
    """[batch, L, G, dim/G] in walking order -> [batch, dim, L]"""
    if reverse:
        grouped = grouped.flip(1)
    return grouped.flatten(2).transpose(1, 2)


def _to_state(grouped: Tensor) -> Tensor:
    """[batch, G, N, dim/G] -> a new contiguous [batch, dim, N]"""
    return grouped.transpose(-2, -1).clone(memory_format=torch.contiguous_format).flatten(1, 2)


def _to_projection(grouped: Tensor, reverse: bool) -> Tensor:
    """[batch, L, G, N] in walking order -> [batch, G, N, L]"""
    return (grouped.flip(1) if reverse else grouped).permute(0, 2, 3, 1)
