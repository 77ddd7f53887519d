"""One step of the selective scan of Mamba (S6), for inputs that arrive one at a time.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, https://arxiv.org/abs/2312.00752
"""

from typing import Dict, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import check_tensors, needs_gradients, runs_on_triton, triton
from .routed import check_shape

if triton is not None:
    from .fused.state_update import run_state_update


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor] = None,
    z: Optional[Tensor] = None,
    dt_bias: Optional[Tensor] = None,
    dt_softplus: bool = False,
    state_batch_indices: Optional[Tensor] = None,
) -> Tensor:
    """One step of `selective_scan`, with the signature and layouts of mamba_ssm's `selective_state_update`.

    With dt' = softplus(dt + dt_bias) (each part optional), for every channel d and state n:

        h = exp(dt' * A) * state + dt' * B * x,    y = (<C, h> + D * x) * silu(z),    state <- h

    Computed in fp32 (fp64 if x is fp64); only what is stored is rounded to the dtypes of state and x. For inference: it
    has no gradients. Where dim stands may stand heads, dim throughout; and tensors may be expanded, as where the
    channels of a head share their step, A and D.

    Args:
        state: What the steps so far left, [batch, dim, N], in any floating dtype; overwritten.
        x: Input [batch, dim], in any floating dtype.
        dt: Step size [batch, dim].
        A: [dim, N], negative for a stable recurrence.
        B: Input projection, [batch, N] or [batch, G, N] for G groups of heads, or of channels where there are no heads.
        C: Output projection, laid out like B.
        D: Skip connection [dim].
        z: Gate [batch, dim].
        dt_bias: [dim].
        dt_softplus: Apply softplus to the step size.
        state_batch_indices: Integers [batch], the entry of state that each entry of x belongs to. They must differ and
            lie in state, which then has any number of entries; neither is checked on a GPU.

    Returns:
        y [batch, dim] in x's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
        RuntimeError: If gradients are wanted.
    """
    tensors = dict(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    check_tensors('selective_state_update', **tensors, state_batch_indices=state_batch_indices)
    _check(tensors, state_batch_indices)
    if needs_gradients(*(tensor for tensor in tensors.values() if tensor is not None)):
        raise RuntimeError('selective_state_update has no gradients; call it within torch.no_grad()')
    shape = x.shape
    B, C = (tensor.unsqueeze(1) if tensor.ndim == 2 else tensor for tensor in (B, C))
    if state.ndim == 3:  # groups of channels are heads: [..., dim, ...] -> [..., G, dim / G, ...]
        state, x, dt, z = (None if t is None else t.unflatten(1, (B.shape[1], -1)) for t in (state, x, dt, z))
        A, D, dt_bias = (None if t is None else t.unflatten(0, (B.shape[1], -1)) for t in (A, D, dt_bias))
    update = run_state_update if runs_on_triton(x) else _plain
    y = update(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus)
    return y.view(shape)


def _plain(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
    indices: Optional[Tensor],
    softplus: bool,
) -> Tensor:
    """The update with heads, in operations that compilers trace: y [batch, heads, dim], contiguous."""
    dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, dt, A = (tensor.to(wide) for tensor in (x, dt, A))
    # [batch, G, N] -> [batch, heads, 1, N]
    B, C = (tensor.to(wide).repeat_interleave(x.shape[1] // B.shape[1], dim=1).unsqueeze(2) for tensor in (B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(wide)
    if softplus:
        dt = F.softplus(dt)
    before = state if indices is None else state.index_select(0, indices)
    h = torch.exp(dt.unsqueeze(-1) * A) * before.to(wide) + (dt * x).unsqueeze(-1) * B
    if indices is None:
        state.copy_(h)
    else:
        state.index_copy_(0, indices.long(), h.to(state.dtype))
    y = (h * C).sum(dim=-1)
    if D is not None:
        y = y + D.to(wide) * x
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(dtype).contiguous()


def _check(tensors: Dict[str, Optional[Tensor]], state_batch_indices: Optional[Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f'{name} must be a real floating tensor, got {tensor.dtype}')
    state, x, dt, A, B, C, D, z, dt_bias = tensors.values()
    if state.ndim not in (3, 4) or 0 in state.shape[1:]:
        got = tuple(state.shape)
        raise ValueError(f'state must be [batch, dim, N] or [batch, heads, dim, N], not empty, got {got}')
    entries, *channels, dstate = state.shape
    batch = entries
    if state_batch_indices is not None:
        if state_batch_indices.ndim != 1 or state_batch_indices.dtype not in (torch.int32, torch.int64):
            got = f'{tuple(state_batch_indices.shape)} {state_batch_indices.dtype}'
            raise ValueError(f'state_batch_indices must be integers [batch], got {got}')
        batch = state_batch_indices.shape[0]
    check_shape('x', x, (batch, *channels))
    check_shape('dt', dt, (batch, *channels))
    check_shape('A', A, (*channels, dstate))
    shared = tuple(B.shape) == (batch, dstate)
    grouped = B.ndim == 3 and (B.shape[0], B.shape[2]) == (batch, dstate)
    if not (shared or (grouped and B.shape[1] and channels[0] % B.shape[1] == 0)):
        expected = f'[{batch}, {dstate}] or [{batch}, G, {dstate}] with G a divisor of {channels[0]}'
        raise ValueError(f'B must be {expected}, got {tuple(B.shape)}')
    check_shape('C', C, B.shape)
    for name, tensor, shape in (('D', D, channels), ('z', z, (batch, *channels)), ('dt_bias', dt_bias, channels)):
        if tensor is not None:
            check_shape(name, tensor, tuple(shape))
