"""One step of Mamba's causal convolution and of its selective scan (S6), for inputs that arrive one at a time.

Mamba: Linear-Time Sequence Modeling with Selective State Spaces, https://arxiv.org/abs/2312.00752
"""

from functools import lru_cache
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._check import check, check_that
from ._device import LN2, LOG2_E, sigmoid, softplus_log2
from ._launch import MAX_PLANS, Launch, cdiv, is_nvidia, next_power_of_2, on_device, runs_on_triton, tl, triton
from ._operator import is_watched

_BLOCK_ELEMENTS = 512  # of the state, in a program
_CONV_CHANNELS = 128  # of a program


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
    has no gradients. With heads, dim is the channels of a head, and [heads, dim] stands for dim throughout. Tensors may
    be expanded, as where the channels of a head share their step, A and D.

    Args:
        state: State before the step, [batch, dim, N], in any floating dtype; overwritten.
        x: Input [batch, dim], in any floating dtype.
        dt: Step size [batch, dim].
        A: [dim, N], negative for a stable recurrence.
        B: Input projection, [batch, N] or [batch, G, N] for G groups of heads, or of channels where there are no heads.
        C: Output projection, laid out like B.
        D: Skip connection [dim].
        z: Gate [batch, dim].
        dt_bias: [dim].
        dt_softplus: Apply softplus to the step size.
        state_batch_indices: Integers [batch], the entry of state of each entry of x. They must differ and be valid for
            state, which then has any number of entries; neither is checked on a GPU.

    Returns:
        y [batch, dim] in x's dtype, contiguous.

    Raises:
        ValueError: If shapes, dtypes or devices do not fit together.
        RuntimeError: If gradients are wanted.
    """
    tensors = dict(state=state, x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias)
    _check(state_batch_indices, **tensors)
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors.values()):
        raise RuntimeError('selective_state_update has no gradients; call it within torch.no_grad()')
    shape = x.shape
    B, C = (tensor.unsqueeze(1) if tensor.ndim == 2 else tensor for tensor in (B, C))
    if state.ndim == 3:  # groups of channels are heads: [..., dim, ...] -> [..., G, dim / G, ...]
        state, x, dt, z = (None if t is None else t.unflatten(1, (B.shape[1], -1)) for t in (state, x, dt, z))
        A, D, dt_bias = (None if t is None else t.unflatten(0, (B.shape[1], -1)) for t in (A, D, dt_bias))
    update = _triton_update if runs_on_triton(x) else _plain_update
    y = update(state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, dt_softplus)
    return y.view(shape)


def _check(
    state_batch_indices: Optional[Tensor],
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],
    z: Optional[Tensor],
    dt_bias: Optional[Tensor],
) -> None:
    channels = 'heads>0 dim>0' if state.ndim == 4 else 'dim>0'
    sizes = check('selective_state_update', state=(state, 'entries dim>0 N>0 | entries heads>0 dim>0 N>0'))
    batch = state.shape[0]
    if state_batch_indices is not None:
        indices = state_batch_indices
        fits = indices.ndim == 1 and indices.dtype in (torch.int32, torch.int64)
        found = f'{tuple(indices.shape)} {indices.dtype}'
        check_that(fits, f'state_batch_indices must be integers [batch], got {found}')
        found = indices.device
        check_that(found == state.device, f'state_batch_indices must be on {state.device} like state, got {found}')
        batch = indices.shape[0]
    check(
        'selective_state_update',
        dict(sizes, batch=batch),
        state=(state, f'entries {channels} N'),
        x=(x, f'batch {channels}'),
        dt=(dt, f'batch {channels}'),
        A=(A, f'{channels} N'),
        B=(B, 'batch N | batch G>0 N'),
        C=(C, 'batch N' if B.ndim == 2 else 'batch G N'),
        D=(D, channels),
        z=(z, f'batch {channels}'),
        dt_bias=(dt_bias, channels),
    )
    groups = B.shape[1] if B.ndim == 3 else 1
    divided = sizes['heads' if state.ndim == 4 else 'dim']
    check_that(divided % groups == 0, 'the groups of B must divide {}, got {}', divided, groups)


def _plain_update(
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


@triton.jit
def state_update_kernel(
    state,  # [entries, heads, dim, N]: updated
    x,  # [batch, heads, dim]
    dt,  # [batch, heads, dim]; with TIED [batch, heads]
    A,  # [heads, dim, N]; with TIED [heads]
    B,  # [batch, heads / share, N]
    C,  # [batch, heads / share, N]
    D,  # [heads, dim], with TIED [heads], or None
    z,  # [batch, heads, dim], or None
    dt_bias,  # [heads, dim], with TIED [heads], or None
    index,  # [batch], the entry of state, or None
    out,  # [batch, heads, dim]: written
    heads,
    dim,
    share,
    batch_strides,  # of x, dt, B, C and z; within an entry of the batch all is contiguous
    N: tl.constexpr,
    TIED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    NVIDIA: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program updates BLOCK_D channels of a head; `share` heads have B and C in common."""
    x_batch, dt_batch, B_batch, C_batch, z_batch = batch_strides
    blocks = tl.cdiv(dim, BLOCK_D)
    program = tl.program_id(0)
    head = program // blocks % heads
    batch = (program // blocks // heads).to(tl.int64)
    entry = batch if index is None else tl.load(index + batch).to(tl.int64)
    channel = program % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    has_channel = channel < dim
    n = tl.arange(0, BLOCK_N)
    has_state = n < N
    mask = has_channel[:, None] & has_state[None, :]
    row = head * dim + channel
    place = head + tl.zeros_like(channel) if TIED else row

    u = tl.load(x + batch * x_batch + row, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    step = tl.load(dt + batch * dt_batch + place, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
    if dt_bias is not None:
        step += tl.load(dt_bias + place, mask=has_channel, other=0.0).to(tl.float32)
    step *= LOG2_E
    if SOFTPLUS:
        step = softplus_log2(step, True, NVIDIA)
    if TIED:
        rate = tl.load(A + place[:, None]).to(tl.float32)  # [BLOCK_D, 1]
    else:
        rate = tl.load(A + row[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_D, BLOCK_N]
    group = head // share * N + n
    b = tl.load(B + batch * B_batch + group, mask=has_state, other=0.0).to(tl.float32)  # [BLOCK_N]
    c = tl.load(C + batch * C_batch + group, mask=has_state, other=0.0).to(tl.float32)  # [BLOCK_N]
    states = state + (entry * heads * dim + row)[:, None] * N + n[None, :]
    h = tl.load(states, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_D, BLOCK_N]
    h = tl.exp2(step[:, None] * rate) * h + (step * LN2 * u)[:, None] * b[None, :]
    tl.store(states, h.to(state.dtype.element_ty), mask=mask)

    y = tl.sum(h * c[None, :], axis=1)
    if D is not None:
        y += tl.load(D + place, mask=has_channel, other=0.0).to(tl.float32) * u
    if z is not None:
        gate = tl.load(z + batch * z_batch + row, mask=has_channel, other=0.0).to(tl.float32)  # [BLOCK_D]
        y *= gate * sigmoid(gate)
    tl.store(out + batch * heads * dim + row, y.to(out.dtype.element_ty), mask=has_channel)


def _run_update(
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
    """Updates state [entries, heads, dim, N] and returns y [batch, heads, dim]; see `selective_state_update`."""
    out = x.new_empty(x.shape)
    with on_device(x):
        tied = _is_tied(dt, 1) and _is_tied(A, 2) and all(t is None or _is_tied(t, 1) for t in (D, dt_bias))
        if tied:
            dt, A = dt[..., 0], A[:, 0, 0]
            D, dt_bias = (None if t is None else t[:, 0] for t in (D, dt_bias))
        A, D, dt_bias, indices = (None if t is None else t.contiguous() for t in (A, D, dt_bias, indices))
        groups = B.shape[1]
        x, dt, B, C, z = rows = [None if t is None else _unit_stride(t.flatten(1)) for t in (x, dt, B, C, z)]
        updated = state.contiguous()
        strides = tuple([0 if row is None else row.stride(0) for row in rows])
        launch = _launch_of(out.shape, groups, state.shape[-1], strides, tied, softplus, is_nvidia(out))
        launch(updated, x, dt, A, B, C, D, z, dt_bias, indices, out)
        if updated is not state:
            state.copy_(updated)
    return out


@lru_cache(maxsize=MAX_PLANS)
def _launch_of(
    shape: Tuple[int, int, int],
    groups: int,
    dstate: int,
    strides: Tuple[int, ...],
    tied: bool,
    softplus: bool,
    nvidia: bool,
) -> Launch:
    batch, heads, dim = shape
    block_n = next_power_of_2(dstate)
    block_d = min(max(_BLOCK_ELEMENTS // block_n, 1), next_power_of_2(dim))
    constants = dstate, tied, softplus, nvidia, block_d, block_n
    grid = batch * heads * cdiv(dim, block_d)
    return Launch(state_update_kernel, grid, (heads, dim, heads // groups, strides), constants)


_operator = torch.library.custom_op('vmamba::selective_state_update', _run_update, mutates_args=('state',))


@_operator.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, indices, softplus):
    return x.new_empty(x.shape)


def _triton_update(state: Tensor, *inputs) -> Tensor:
    """`_run_update`, through the dispatcher where something watches."""
    if is_watched():
        return _operator(state, *inputs)
    y = _run_update(state, *inputs)
    torch.autograd.graph.increment_version(state)  # as the dispatcher does, for graphs that saved the state
    return y


def _is_tied(tensor: Tensor, dims: int) -> bool:
    """Whether the last dimensions are one number, expanded."""
    return not any(tensor.stride()[-dims:])


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    activation: Optional[str] = None,
) -> Tensor:
    """One step of `causal_conv1d`, with the signature and layouts of causal_conv1d's `causal_conv1d_update`.

    Shifts x into the state, the newest column last, and returns activation(bias + sum_t weight[:, t] * state[..., t]).
    Computed in at least fp32. For inference: it has no gradients.

    Args:
        x: Input [batch, dim], in any floating dtype.
        conv_state: The last w inputs before x, [batch, dim, w], in any floating dtype; overwritten.
        weight: [dim, w].
        bias: [dim].
        activation: None, 'silu' or 'swish', which is the same.

    Returns:
        [batch, dim] in x's dtype.

    Raises:
        ValueError: If shapes, dtypes, devices or options do not fit together.
        RuntimeError: If gradients are wanted.
    """
    check(
        'causal_conv1d_update',
        x=(x, 'batch dim'),
        conv_state=(conv_state, 'batch dim w>0'),
        weight=(weight, 'dim w'),
        bias=(bias, 'dim'),
    )
    check_that(activation in (None, 'silu', 'swish'), f"activation must be None, 'silu' or 'swish', got {activation!r}")
    tensors = x, conv_state, weight, bias
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise RuntimeError('causal_conv1d_update has no gradients; call it within torch.no_grad()')
    silu = activation is not None
    if runs_on_triton(x):
        if is_watched():
            return _conv_operator(conv_state, x, weight, bias, silu)
        out = _run_conv(conv_state, x, weight, bias, silu)
        torch.autograd.graph.increment_version(conv_state)
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    conv_state.copy_(torch.cat([conv_state[..., 1:], x.unsqueeze(-1).to(conv_state.dtype)], dim=-1))
    out = (conv_state.to(wide) * weight.to(wide)).sum(dim=-1)
    out = out if bias is None else out + bias.to(wide)
    return (F.silu(out) if silu else out).to(x.dtype)


@triton.jit
def conv_update_kernel(
    state,  # [batch, dim, TAPS]: updated
    x,  # [batch, dim]
    weight,  # [dim, TAPS]
    bias,  # [dim], or None
    out,  # [batch, dim]: written
    dim,
    x_batch,  # stride of x; within an entry of the batch all is contiguous
    TAPS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program updates BLOCK_D channels of an entry of the batch."""
    blocks = tl.cdiv(dim, BLOCK_D)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = channel < dim
    columns = state + (batch * dim + channel) * TAPS
    newest = tl.load(x + batch * x_batch + channel, mask=mask, other=0.0).to(state.dtype.element_ty)  # [BLOCK_D]
    y = tl.zeros([BLOCK_D], tl.float32)
    if bias is not None:
        y += tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    for tap in tl.static_range(TAPS):
        column = newest
        if tap < TAPS - 1:
            column = tl.load(columns + tap + 1, mask=mask, other=0.0)  # [BLOCK_D]
        tl.store(columns + tap, column, mask=mask)
        y += column.to(tl.float32) * tl.load(weight + channel * TAPS + tap, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        y *= sigmoid(y)
    tl.store(out + batch * dim + channel, y.to(out.dtype.element_ty), mask=mask)


def _run_conv(state: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], silu: bool) -> Tensor:
    """Updates state [batch, dim, w] and returns [batch, dim]; see `causal_conv1d_update`."""
    out = x.new_empty(x.shape)
    with on_device(x):
        x, weight, bias = _unit_stride(x), weight.contiguous(), None if bias is None else bias.contiguous()
        updated = state.contiguous()
        launch = _conv_launch_of(*state.shape, x.stride(0), silu)
        launch(updated, x, weight, bias, out)
        if updated is not state:
            state.copy_(updated)
    return out


@lru_cache(maxsize=MAX_PLANS)
def _conv_launch_of(batch: int, dim: int, taps: int, x_batch: int, silu: bool) -> Launch:
    block_d = min(_CONV_CHANNELS, next_power_of_2(dim))
    return Launch(conv_update_kernel, batch * cdiv(dim, block_d), (dim, x_batch), (taps, silu, block_d))


_conv_operator = torch.library.custom_op('vmamba::causal_conv1d_update', _run_conv, mutates_args=('state',))


@_conv_operator.register_fake
def _(state, x, weight, bias, silu):
    return x.new_empty(x.shape)
