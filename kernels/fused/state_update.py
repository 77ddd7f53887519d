"""One step of the selective scan on a Triton kernel, as an operator of torch: memory is all that it takes time for."""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import compiles_for_nvidia, device_of, operators_are_watched
from .arithmetic import parts, power_of_2
from .elementwise import LN2, LOG2_E, sigmoid, softplus_log2
from .launcher import Launcher
from .sequences import unit_stride

BLOCK_ELEMENTS = 512  # of the state, in a program


@triton.jit
def state_update(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    dt_bias_ptr,
    index_ptr,
    out_ptr,
    heads,
    dim,
    share,
    x_batch,
    dt_batch,
    B_batch,
    C_batch,
    z_batch,
    N: tl.constexpr,
    TIED: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    NVIDIA: tl.constexpr,
    ROWS: tl.constexpr,
    STATES: tl.constexpr,
):
    """A program updates ROWS channels of a head. With TIED, dt, A, D and dt_bias hold one number a head.

    `share` heads have B and C in common; x_batch and the like are strides, within a batch entry all is contiguous.
    """
    blocks = tl.cdiv(dim, ROWS)
    program = tl.program_id(0)
    head = program // blocks % heads
    batch = (program // blocks // heads).to(tl.int64)
    entry = batch if index_ptr is None else tl.load(index_ptr + batch).to(tl.int64)
    channel = program % blocks * ROWS + tl.arange(0, ROWS)
    has_channel = channel < dim
    n = tl.arange(0, STATES)
    has_state = n < N
    mask = has_channel[:, None] & has_state[None, :]
    row = head * dim + channel
    place = head + tl.zeros_like(channel) if TIED else row

    x = tl.load(x_ptr + batch * x_batch + row, mask=has_channel, other=0.0).to(tl.float32)
    step = tl.load(dt_ptr + batch * dt_batch + place, mask=has_channel, other=0.0).to(tl.float32)
    if dt_bias_ptr is not None:
        step += tl.load(dt_bias_ptr + place, mask=has_channel, other=0.0).to(tl.float32)
    step *= LOG2_E
    if SOFTPLUS:
        step = softplus_log2(step, True, NVIDIA)
    if TIED:
        A = tl.load(A_ptr + place[:, None]).to(tl.float32)
    else:
        A = tl.load(A_ptr + row[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
    group = head // share * N + n
    B = tl.load(B_ptr + batch * B_batch + group, mask=has_state, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + batch * C_batch + group, mask=has_state, other=0.0).to(tl.float32)
    states = state_ptr + (entry * heads * dim + row)[:, None] * N + n[None, :]
    h = tl.load(states, mask=mask, other=0.0).to(tl.float32)
    h = tl.exp2(step[:, None] * A) * h + (step * LN2 * x)[:, None] * B[None, :]
    tl.store(states, h.to(state_ptr.dtype.element_ty), mask=mask)

    y = tl.sum(h * C[None, :], axis=1)
    if D_ptr is not None:
        y += tl.load(D_ptr + place, mask=has_channel, other=0.0).to(tl.float32) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + batch * z_batch + row, mask=has_channel, other=0.0).to(tl.float32)
        y *= z * sigmoid(z)
    tl.store(out_ptr + batch * heads * dim + row, y.to(out_ptr.dtype.element_ty), mask=has_channel)


_state_update = Launcher(state_update)


def _update(
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
    batch, heads, dim = x.shape
    dstate = state.shape[-1]
    states = power_of_2(dstate)
    rows = min(max(BLOCK_ELEMENTS // states, 1), power_of_2(dim))
    with device_of(x):
        tied = _is_tied(dt, 1) and _is_tied(A, 2) and all(t is None or _is_tied(t, 1) for t in (D, dt_bias))
        if tied:
            dt, A = dt[..., 0], A[:, 0, 0]
            D, dt_bias = (None if t is None else t[:, 0] for t in (D, dt_bias))
        A, D, dt_bias, indices = (None if t is None else t.contiguous() for t in (A, D, dt_bias, indices))
        x, dt, flat_B, flat_C, z = (None if t is None else unit_stride(t.flatten(1)) for t in (x, dt, B, C, z))
        updated = state.contiguous()
        _state_update(
            batch * heads * parts(dim, rows),
            (updated, x, dt, A, flat_B, flat_C, D, z, dt_bias, indices, out),
            (heads, dim, heads // B.shape[1], *(0 if t is None else t.stride(0) for t in (x, dt, flat_B, flat_C, z))),
            (dstate, tied, softplus, compiles_for_nvidia(out), rows, states),
            warps=4,
        )
        if updated is not state:
            state.copy_(updated)
    return out


def _is_tied(tensor: Tensor, dims: int) -> bool:
    """Whether the last dimensions hold one number, expanded."""
    return not any(tensor.stride()[-dims:])


state_update_fused = torch.library.custom_op('vmamba::state_update_fused', _update, mutates_args=('state',))


@state_update_fused.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, indices, softplus):
    return x.new_empty(x.shape)


def run_state_update(state: Tensor, *arguments) -> Tensor:
    """`_update`, past the dispatcher where nothing watches."""
    if operators_are_watched():
        return state_update_fused(state, *arguments)
    y = _update(state, *arguments)
    torch.autograd.graph.increment_version(state)  # as the dispatcher does, for who has kept the state for gradients
    return y
