"""Triton kernels of the selective scan's forward pass, and of the carries between the chunks of L.

Sequences are walked tile by tile (see `tiles`), all states of a tile one after the other. What a tile hands to
the next is kept in `states` [batch, dim, N, slots], where the slots of chunk c of L begin at `c * chunk_slots`.
"""

import triton
import triton.language as tl

from ..elementwise import LOG2_E, MAX_DECAY, sigmoid
from .tiles import (
    last_lane_offset,
    load_coefficients,
    load_tile,
    only_if,
    softplus,
    store_tile,
    sum_positions,
    walk_lanes,
    walk_registers,
)


@triton.jit
def load_delta(
    delta,
    rows,
    in_rows,
    bias,
    first,
    length,
    unit,
    SOFTPLUS: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    E: tl.constexpr,
    DIRECT: tl.constexpr,
):
    """delta + bias, and the step: its softplus where wanted, zero beyond the end, where states then do not change."""
    raw = load_tile(delta, rows, in_rows, first, length, unit, R, J, E, DIRECT) + bias[:, None, None]
    step = softplus(raw) if SOFTPLUS else raw
    position = first + (tl.arange(0, J) * E)[:, None] + tl.arange(0, E)[None, :]
    return raw, tl.where((position < length)[None, :, :], step, 0.0)


@triton.jit(do_not_specialize=['unit'])
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
    padded,
    dim,
    dstate,
    group_dim,
    blocks,
    share,
    B_share,
    C_share,
    chunk_tiles,
    slots,
    chunk_slots,
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
    unit,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    DIRECT: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    E: tl.constexpr,
):
    """One program walks one chunk of L for `R` channels of one group."""
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    block = program % blocks
    group = (program // blocks) % (dim // group_dim)
    batch = (program // blocks // (dim // group_dim)).to(tl.int64)

    local = block * R + tl.arange(0, R)
    in_rows = local < group_dim
    channel = (group * group_dim + local).to(tl.int64)
    u += batch * u_batch
    delta += batch * delta_batch
    z += batch * z_batch
    y += batch * y_batch
    if not CONSTANT_B:
        B += batch * B_batch + (group // B_share).to(tl.int64) * B_group
    if not CONSTANT_C:
        C += batch * C_batch + (group // C_share).to(tl.int64) * C_group
    state_row = (batch * dim + channel) * dstate
    bias = tl.zeros((R,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + channel, mask=in_rows, other=0.0).to(tl.float32)
    end_offset, end_lane = last_lane_offset(J, REVERSE)

    tiles = tl.cdiv(length, J * E)
    begin = chunk * chunk_tiles
    slot = chunk.to(tl.int64) * chunk_slots
    count = tl.minimum(chunk_tiles, tiles - begin)
    for k in range(0, count):
        tile = begin + k
        first = (tiles - 1 - tile if REVERSE else tile) * (J * E)
        x = load_tile(u, channel * u_dim, in_rows, first, length, unit, R, J, E, DIRECT)
        raw, step = load_delta(
            delta, channel // share * delta_dim, in_rows, bias, first, length, unit, SOFTPLUS, R, J, E, DIRECT
        )
        total = tl.sum(step, 2)
        drive = step * x
        if HAS_D:
            out = x * tl.load(D + channel, mask=in_rows, other=0.0).to(tl.float32)[:, None, None]
        else:
            out = tl.zeros((R, J, E), tl.float32)
        if SAVE:
            slot_in = slot + k
            slot_out = slot + k + 1
            # The state before the next chunk is there already.
            kept_rows = only_if((k + 1 < count) | (tile + 1 == tiles), group_dim)
        else:
            slot_in = slot + k % 2
            slot_out = slot + (k + 1) % 2
            kept_rows = group_dim
        keep = (local < kept_rows)[:, None] & end_lane
        at_start = local < only_if(tile == 0, group_dim)
        later = local < only_if(tile > 0, group_dim)
        for n in range(0, dstate):
            rate = tl.load(A + channel * dstate + n, mask=in_rows, other=0.0) * LOG2_E
            b = load_coefficients(B + n * B_state, first, padded, channel * dstate, in_rows, J, E, CONSTANT_B)
            c = load_coefficients(C + n * C_state, first, padded, channel * dstate, in_rows, J, E, CONSTANT_C)
            carry = tl.load(states + (state_row + n) * slots + slot_in, mask=later, other=0.0)
            if HAS_INITIAL:
                carry += tl.load(initial + state_row + n, mask=at_start, other=0.0).to(tl.float32)
            decay = tl.exp2(step * rate[:, None, None])
            push = drive * b
            if J == 1:
                h, kept, after = walk_registers(decay, push, carry[:, None], R, J, E, REVERSE)
            else:
                unused, kept, own = walk_registers(decay, push, tl.zeros((R, J), tl.float32), R, J, E, REVERSE)
                before, after = walk_lanes(tl.exp2(total * rate[:, None]), own, carry, R, J, REVERSE)
                h, kept, unused = walk_registers(decay, push, before, R, J, E, REVERSE)
            out += h * c
            tl.store(states + (state_row + n)[:, None] * slots + slot_out + end_offset, after, mask=keep)
        # The states of this tile are read by other threads than wrote them.
        tl.debug_barrier()
        if HAS_Z:
            gate = load_tile(z, channel * z_dim, in_rows, first, length, unit, R, J, E, DIRECT)
            out = out * gate * sigmoid(gate)
        store_tile(y, channel * y_dim, in_rows, first, length, out, R, J, E)


@triton.jit(do_not_specialize=['unit'])
def scan_summary_kernel(
    x,
    z,
    delta,
    A,
    B,
    delta_bias,
    states,
    steps,
    length,
    padded,
    dim,
    dstate,
    group_dim,
    blocks,
    share,
    B_share,
    chunk_tiles,
    slots,
    chunk_slots,
    x_batch,
    x_dim,
    z_batch,
    z_dim,
    delta_batch,
    delta_dim,
    B_batch,
    B_group,
    B_state,
    unit,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    REVERSE: tl.constexpr,
    ADJOINT: tl.constexpr,
    DIRECT: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    E: tl.constexpr,
):
    """What each chunk adds to its carry, into the chunk's first slot, and the sum of its steps [chunks, batch, dim].

    Forward that is sum_l exp(A * (steps after l)) * step_l * B_l * u_l. The adjoint walk, where x is the gradient of
    y and B is C, hands on sum_l exp(A * (steps up to l)) * C_l * x_l; REVERSE is then the other way round. Tiles are
    visited from the end of the walk to its start, so a running sum of the steps gives all exponents without a
    recurrence.
    """
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    block = program % blocks
    group = (program // blocks) % (dim // group_dim)
    batch = (program // blocks // (dim // group_dim)).to(tl.int64)
    local = block * R + tl.arange(0, R)
    in_rows = local < group_dim
    channel = (group * group_dim + local).to(tl.int64)
    x += batch * x_batch
    z += batch * z_batch
    delta += batch * delta_batch
    if not CONSTANT_B:
        B += batch * B_batch + (group // B_share).to(tl.int64) * B_group
    state_row = (batch * dim + channel) * dstate
    bias = tl.zeros((R,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + channel, mask=in_rows, other=0.0).to(tl.float32)
    slot = chunk.to(tl.int64) * chunk_slots
    running = tl.zeros((R,), tl.float32)
    tiles = tl.cdiv(length, J * E)
    begin = chunk * chunk_tiles
    count = tl.minimum(chunk_tiles, tiles - begin)
    for k in range(0, count):
        tile = begin + count - 1 - k
        first = (tiles - 1 - tile if REVERSE else tile) * (J * E)
        push = load_tile(x, channel * x_dim, in_rows, first, length, unit, R, J, E, DIRECT)
        raw, step = load_delta(
            delta, channel // share * delta_dim, in_rows, bias, first, length, unit, SOFTPLUS, R, J, E, DIRECT
        )
        if HAS_Z:
            gate = load_tile(z, channel * z_dim, in_rows, first, length, unit, R, J, E, DIRECT)
            push = push * gate * sigmoid(gate)
        if not ADJOINT:
            push = push * step
        one = tl.full((R, J, E), 1.0, tl.float32)
        total = tl.sum(step, 2)
        before, after = walk_lanes(tl.full((R, J), 1.0, tl.float32), total, running, R, J, not REVERSE)
        later, kept, unused = walk_registers(one, step, before, R, J, E, not REVERSE)
        if not ADJOINT:
            later -= step
        running += tl.sum(total, 1)
        for n in range(0, dstate):
            rate = tl.load(A + channel * dstate + n, mask=in_rows, other=0.0) * LOG2_E
            b = load_coefficients(B + n * B_state, first, padded, channel * dstate, in_rows, J, E, CONSTANT_B)
            factor = tl.minimum(tl.exp2(later * rate[:, None, None]), MAX_DECAY)
            address = states + (state_row + n) * slots + slot
            so_far = tl.load(address, mask=local < only_if(k > 0, group_dim), other=0.0)
            tl.store(address, so_far + sum_positions(factor * push * b), mask=in_rows)
        tl.debug_barrier()
    batches = tl.num_programs(0) // blocks // (dim // group_dim)
    tl.store(steps + (chunk * batches + batch) * dim + channel, running, mask=in_rows)


@triton.jit
def scan_combine_kernel(
    A,
    initial,
    states,
    steps,
    rows,
    dim,
    dstate,
    chunks,
    slots,
    chunk_slots,
    HAS_INITIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replaces what each chunk adds to its carry by the carry into the chunk. `rows` is batch * dim * N."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    channel = row // dstate
    rate = tl.load(A + row % (dim * dstate), mask=inside, other=0.0) * LOG2_E
    carry = tl.zeros((BLOCK,), tl.float32)
    if HAS_INITIAL:
        carry = tl.load(initial + row, mask=inside, other=0.0).to(tl.float32)
    for chunk in range(0, chunks):
        address = states + row * slots + chunk * chunk_slots
        added = tl.load(address, mask=inside, other=0.0)
        total = tl.load(steps + chunk * (rows // dstate) + channel, mask=inside, other=0.0)
        tl.store(address, carry, mask=inside)
        carry = tl.minimum(tl.exp2(total * rate), MAX_DECAY) * carry + added
