"""Triton kernels of the selective scan's forward pass, and of the carries between the chunks of L.

Sequences are walked tile by tile (see `tiles`), all states of a tile one after the other. Where there are several,
what a tile hands to the next waits in memory, where each thread finds its own.

B and C are loaded by each thread for itself, from one address a row: known alignment, or a contiguity other than the
pretended one, would make the compiler deal neighbouring steps out to lanes.
"""

import triton
import triton.language as tl

from ..elementwise import MAX_DECAY, sigmoid
from .tiles import LN2, load_delta, load_steps, recur, store_steps


@triton.jit(do_not_specialize_on_alignment=['B', 'C'])
def scan_forward_kernel(
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial,
    y,
    states,
    length,
    dim,
    dstate,
    group_dim,
    share,
    B_share,
    C_share,
    chunk_tiles,
    chunk_slots,
    slot_step,
    slots,
    u_batch,
    u_dim,
    delta_batch,
    delta_dim,
    z_batch,
    z_dim,
    y_batch,
    y_dim,
    B_batch,
    B_group,
    B_state,
    C_batch,
    C_group,
    C_state,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    NVIDIA: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program walks one chunk of L for COLUMNS channels.

    states [batch, slots, N, dim] gets the state after tile i of chunk c in slot c * chunk_slots + (i + 1) * slot_step,
    the state before each chunk but the first is there already.
    """
    blocks = tl.cdiv(dim, COLUMNS)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    chunk = tl.program_id(1)

    index = block * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = index < dim
    channel = tl.minimum(index, dim - 1).to(tl.int64)
    group = tl.minimum(index, dim - 1) // group_dim
    u_rows = channel * u_dim
    delta_rows = (tl.minimum(index, dim - 1) // share).to(tl.int64) * delta_dim
    z_rows = channel * z_dim
    y_rows = channel * y_dim
    if not CONSTANT_B:
        B += (batch * B_batch + (group // B_share).to(tl.int64) * B_group)[None, :]
    if not CONSTANT_C:
        C += (batch * C_batch + (group // C_share).to(tl.int64) * C_group)[None, :]
    u += batch * u_batch
    delta += batch * delta_batch
    z += batch * z_batch
    y += batch * y_batch
    A += channel
    bias = tl.zeros([COLUMNS], tl.float32)
    skip = tl.zeros([COLUMNS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + channel).to(tl.float32)
    if HAS_D:
        skip = tl.load(D + channel).to(tl.float32)
    tiles = tl.cdiv(length, T)
    begin = chunk * chunk_tiles
    count = tl.minimum(chunk_tiles, tiles - begin)
    states += batch * slots * (dstate * dim) + index
    row = tl.arange(0, T)[:, None]
    if REVERSE:
        row = T - 1 - row
    carry = tl.zeros([COLUMNS], tl.float32)
    if chunk == 0:
        # A thread finds its own start there; the other chunks' is there already.
        for n in range(dstate):
            if HAS_INITIAL:
                carry = tl.load(initial + (batch * dim + channel) * dstate + n).to(tl.float32)
            tl.store(states + n * dim, carry, mask=in_rows)
    tl.debug_barrier()
    for i in range(count):
        tile = begin + i
        first = (tiles - 1 - tile if REVERSE else tile) * T
        x = load_steps(u, u_rows, first, length, T, COLUMNS, REVERSE)
        raw, step = load_delta(delta, delta_rows, bias, first, length, T, COLUMNS, REVERSE, SOFTPLUS, EXACT, NVIDIA)
        drive = step * LN2 * x
        out = x * skip[None, :]
        here = states + tl.cast(chunk * chunk_slots + i * slot_step, tl.int64) * (dstate * dim)
        after = here + slot_step * (dstate * dim)
        # The state before the next chunk is there already.
        kept = tl.where((i + 1 < count) | (tile + 1 == tiles), in_rows, False)
        tl.debug_barrier()
        B_tile = B + first
        C_tile = C + first
        for n in range(dstate):
            rate = tl.load(A + n * dim)
            carry = tl.load(here + n * dim, mask=in_rows, other=0.0)
            if CONSTANT_B:
                b = tl.load(B + channel * dstate + n)[None, :]
            else:
                b = tl.load(tl.max_contiguous(B_tile + row, (1, COLUMNS)))
                B_tile += B_state
            if CONSTANT_C:
                c = tl.load(C + channel * dstate + n)[None, :]
            else:
                c = tl.load(tl.max_contiguous(C_tile + row, (1, COLUMNS)))
                C_tile += C_state
            h, before, carry = recur(tl.exp2(step * rate[None, :]), drive * b, carry, T, COLUMNS)
            out += h * c
            tl.store(after + n * dim, carry, mask=kept)
        if HAS_Z:
            gate = load_steps(z, z_rows, first, length, T, COLUMNS, REVERSE)
            out = out * gate * sigmoid(gate)
        store_steps(y, y_rows, in_rows, first, length, out, T, COLUMNS, REVERSE)


@triton.jit(do_not_specialize_on_alignment=['B'])
def scan_summary_kernel(
    x,
    z,
    delta,
    A,
    B,
    delta_bias,
    ends,
    totals,
    length,
    dim,
    dstate,
    group_dim,
    share,
    B_share,
    chunk_tiles,
    x_batch,
    x_dim,
    z_batch,
    z_dim,
    delta_batch,
    delta_dim,
    B_batch,
    B_group,
    B_state,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
    EXACT: tl.constexpr,
    NVIDIA: tl.constexpr,
    T: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The state after each chunk but the last from zero before it, ends [batch, chunks - 1, N, dim], and the sum of its
    steps / ln 2, totals [batch, chunks - 1, dim].

    ADJOINT walks g_l = decay_l * (C_l * x_l + g_{l+1}), where x is the gradient of y, B is C, and REVERSE is that of
    this walk.
    """
    blocks = tl.cdiv(dim, COLUMNS)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    chunk = tl.program_id(1)
    index = block * COLUMNS + tl.arange(0, COLUMNS)
    in_rows = index < dim
    index = tl.minimum(index, dim - 1)
    channel = index.to(tl.int64)
    x += batch * x_batch
    z += batch * z_batch
    delta += batch * delta_batch
    A += channel
    x_rows = channel * x_dim
    z_rows = channel * z_dim
    delta_rows = (index // share).to(tl.int64) * delta_dim
    if not CONSTANT_B:
        B += (batch * B_batch + (index // group_dim // B_share).to(tl.int64) * B_group)[None, :]
    bias = tl.zeros([COLUMNS], tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + channel).to(tl.float32)
    slot = batch * tl.num_programs(1) + chunk
    ends += slot * (dstate * dim) + channel
    totals += slot * dim + channel
    tiles = tl.cdiv(length, T)
    row = tl.arange(0, T)[:, None]
    if REVERSE:
        row = T - 1 - row
    total = tl.zeros([COLUMNS], tl.float32)
    for i in range(chunk_tiles):
        tile = chunk * chunk_tiles + i
        first = (tiles - 1 - tile if REVERSE else tile) * T
        push = load_steps(x, x_rows, first, length, T, COLUMNS, REVERSE)
        raw, step = load_delta(delta, delta_rows, bias, first, length, T, COLUMNS, REVERSE, SOFTPLUS, EXACT, NVIDIA)
        if HAS_Z:
            gate = load_steps(z, z_rows, first, length, T, COLUMNS, REVERSE)
            push = push * gate * sigmoid(gate)
        if not ADJOINT:
            push = push * step * LN2
        total += tl.sum(step, axis=0)
        started = tl.where(i > 0, in_rows, False)
        tl.debug_barrier()
        B_tile = B + first
        for n in range(dstate):
            rate = tl.load(A + n * dim)
            carry = tl.load(ends + n * dim, mask=started, other=0.0)
            if CONSTANT_B:
                b = tl.load(B + channel * dstate + n)[None, :]
            else:
                b = tl.load(tl.max_contiguous(B_tile + row, (1, COLUMNS)))
                B_tile += B_state
            decay = tl.exp2(step * rate[None, :])
            value = push * b
            if ADJOINT:
                value = value * decay
            h, kept, carry = recur(decay, value, carry, T, COLUMNS)
            tl.store(ends + n * dim, carry, mask=in_rows)
    tl.store(totals, total, mask=in_rows)


@triton.jit
def _chunk_after(decay0, value0, decay1, value1):
    # An infinite product of decays that grow would make a NaN of a state that is zero.
    return tl.minimum(decay0 * decay1, MAX_DECAY), decay1 * value0 + value1


@triton.jit
def scan_combine_kernel(
    A,
    initial,
    ends,
    totals,
    states,
    dim,
    dstate,
    chunks,
    slots,
    chunk_slots,
    HAS_INITIAL: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Writes the state before each chunk but the first to the chunk's first slot in states [batch, slots, N, dim]."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < dstate * dim
    channel = column % dim
    rate = tl.load(A + column, mask=inside, other=0.0)
    carry = tl.zeros([COLUMNS], tl.float32)
    if HAS_INITIAL:
        start = initial + (batch * dim + channel) * dstate + column // dim
        carry = tl.load(start, mask=inside, other=0.0).to(tl.float32)
    for begin in range(0, chunks - 1, CHUNKS):
        chunk = begin + tl.arange(0, CHUNKS)
        mask = inside[None, :] & (chunk < chunks - 1)[:, None]
        source = (batch * (chunks - 1) + chunk)[:, None]
        total = tl.load(totals + source * dim + channel[None, :], mask=mask, other=0.0)
        end = tl.load(ends + source * (dstate * dim) + column[None, :], mask=mask, other=0.0)
        decay = tl.minimum(tl.exp2(total * rate[None, :]), MAX_DECAY)
        end = tl.where((tl.arange(0, CHUNKS) == 0)[:, None], decay * carry[None, :] + end, end)
        decays, state = tl.associative_scan((decay, end), 0, _chunk_after)
        target = (batch * slots + (chunk + 1).to(tl.int64) * chunk_slots)[:, None] * (dstate * dim)
        tl.store(states + target + column[None, :], state, mask=mask)
        carry = tl.sum(tl.where((tl.arange(0, CHUNKS) == CHUNKS - 1)[:, None], state, 0.0), axis=0)
