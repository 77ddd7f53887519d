"""Triton kernel of the selective scan's backward pass.

Walks the tiles in the opposite order of the forward pass. In each it recomputes the states from the one that the
forward pass kept, and solves the adjoint recurrence g_l = C_l * grad_y_l + exp(step_{l+1} * A) * g_{l+1}.
"""

import triton
import triton.language as tl

from ..elementwise import LOG2_E, sigmoid
from .forward import load_delta
from .tiles import (
    last_lane_offset,
    load_coefficients,
    load_tile,
    only_if,
    store_tile,
    sum_positions,
    walk_lanes,
    walk_registers,
    walk_registers_adjoint,
)


@triton.jit
def _accumulate(pointer, rows, in_rows, earlier, value, offset, lane, J: tl.constexpr):
    """Adds `value` [R] to what the `earlier` rows hold already."""
    value += tl.load(pointer + rows, mask=earlier, other=0.0)
    # As in `last_lane_offset`, the store leaves the data where they are.
    value = tl.broadcast_to(value[:, None], (value.shape[0], J))
    tl.store(pointer + rows[:, None] + offset, value, mask=in_rows[:, None] & lane)


@triton.jit
def _accumulate_positions(pointer, first, padded, value, started, J: tl.constexpr, E: tl.constexpr):
    """Adds the sum over channels of `value` [R, J, E] to the positions of a tile in memory."""
    position = first + tl.arange(0, J * E)
    value = tl.reshape(tl.sum(value, 0), (J * E,))
    inside = position < padded
    value += tl.load(pointer + position, mask=position < only_if(started, padded), other=0.0)
    tl.store(pointer + position, value, mask=inside)


@triton.jit(do_not_specialize=['unit'])
def scan_backward_kernel(
    grad_y,
    grad_last,
    u,
    delta,
    A,
    B,
    C,
    D,
    z,
    delta_bias,
    initial,
    states,
    work,
    grad_u,
    grad_delta,
    grad_z,
    grad_B,
    grad_C,
    grad_D,
    grad_bias,
    length,
    padded,
    dim,
    dstate,
    group_dim,
    splits,
    split_blocks,
    share,
    B_share,
    C_share,
    slots,
    chunk_tiles,
    work_slots,
    chunk_slots,
    grad_y_batch,
    grad_y_dim,
    u_batch,
    u_dim,
    delta_batch,
    delta_dim,
    z_batch,
    z_dim,
    B_batch,
    B_group,
    B_state,
    C_batch,
    C_group,
    C_state,
    grad_batch,
    grad_dim,
    unit,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
    HAS_LAST: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    REVERSE: tl.constexpr,
    DIRECT: tl.constexpr,
    R: tl.constexpr,
    J: tl.constexpr,
    E: tl.constexpr,
):
    """One program walks one chunk of L for `split_blocks` blocks of R channels of one group, one after the other.

    `states` [batch, dim, N, tiles + 1] holds the state before each tile but the first, which is `initial`.
    `work` [batch, dim, N, chunks * chunk_slots] holds in each chunk's slots: two for the adjoint carry from tile to
    tile, then the sums over the chunk for the gradient of A and, where they are constant, of B and C. The gradients
    of other B and C are [splits, batch, groups, N, padded].
    """
    program = tl.program_id(0)
    chunk = tl.program_id(1)
    groups = dim // group_dim
    split = program % splits
    group = (program // splits) % groups
    batch = (program // splits // groups).to(tl.int64)
    batches = tl.num_programs(0) // splits // groups

    grad_y += batch * grad_y_batch
    u += batch * u_batch
    delta += batch * delta_batch
    z += batch * z_batch
    grad_u += batch * grad_batch
    grad_delta += batch * grad_batch
    grad_z += batch * grad_batch
    if not CONSTANT_B:
        B += batch * B_batch + (group // B_share).to(tl.int64) * B_group
    if not CONSTANT_C:
        C += batch * C_batch + (group // C_share).to(tl.int64) * C_group
    coefficients = ((split * batches + batch) * groups + group) * dstate * padded.to(tl.int64)
    grad_B += coefficients
    grad_C += coefficients

    end_offset, end_lane = last_lane_offset(J, not REVERSE)
    tiles = tl.cdiv(length, J * E)
    begin = chunk * chunk_tiles
    slot = chunk.to(tl.int64) * chunk_slots
    within = (tl.arange(0, J) * E)[:, None] + tl.arange(0, E)[None, :]

    for block in range(0, split_blocks):
        local = (split * split_blocks + block) * R + tl.arange(0, R)
        in_rows = local < group_dim
        channel = (group * group_dim + local).to(tl.int64)
        state_row = (batch * dim + channel) * dstate
        bias = tl.zeros((R,), tl.float32)
        skip = tl.zeros((R,), tl.float32)
        if HAS_BIAS:
            bias = tl.load(delta_bias + channel, mask=in_rows, other=0.0).to(tl.float32)
        if HAS_D:
            skip = tl.load(D + channel, mask=in_rows, other=0.0).to(tl.float32)
        sum_D = tl.zeros((R,), tl.float32)
        sum_bias = tl.zeros((R,), tl.float32)

        for k in range(0, tl.minimum(chunk_tiles, tiles - begin)):
            tile = tiles - 1 - begin - k
            first = (tiles - 1 - tile if REVERSE else tile) * (J * E)
            x = load_tile(u, channel * u_dim, in_rows, first, length, unit, R, J, E, DIRECT)
            raw, step = load_delta(
                delta, channel // share * delta_dim, in_rows, bias, first, length, unit, SOFTPLUS, R, J, E, DIRECT
            )
            grad_out = load_tile(grad_y, channel * grad_y_dim, in_rows, first, length, unit, R, J, E, DIRECT)
            grad_gated = grad_out
            if HAS_Z:
                gate = load_tile(z, channel * z_dim, in_rows, first, length, unit, R, J, E, DIRECT)
                open_gate = sigmoid(gate)
                grad_out = grad_gated * gate * open_gate
            out = tl.zeros((R, J, E), tl.float32)
            total = tl.sum(step, 2)
            drive = step * x
            grad_drive = tl.zeros((R, J, E), tl.float32)
            grad_step = tl.zeros((R, J, E), tl.float32)

            earlier = local < only_if(k > 0, group_dim)
            at_start = local < only_if(tile == 0, group_dim)
            after_start = local < only_if(tile > 0, group_dim)
            at_end = local < only_if(begin + k == 0, group_dim)
            before_end = local < only_if(begin + k > 0, group_dim)
            for n in range(0, dstate):
                slope = tl.load(A + channel * dstate + n, mask=in_rows, other=0.0)
                rate = slope * LOG2_E
                b = load_coefficients(B + n * B_state, first, padded, channel * dstate, in_rows, J, E, CONSTANT_B)
                c = load_coefficients(C + n * C_state, first, padded, channel * dstate, in_rows, J, E, CONSTANT_C)
                carry = tl.load(states + (state_row + n) * slots + tile, mask=after_start, other=0.0)
                if HAS_INITIAL:
                    carry += tl.load(initial + state_row + n, mask=at_start, other=0.0).to(tl.float32)
                decay = tl.exp2(step * rate[:, None, None])
                thread_decay = tl.exp2(total * rate[:, None])
                push = drive * b
                unused, kept, own = walk_registers(decay, push, tl.zeros((R, J), tl.float32), R, J, E, REVERSE)
                before, after = walk_lanes(thread_decay, own, carry, R, J, REVERSE)
                h, kept, unused = walk_registers(decay, push, before, R, J, E, REVERSE)
                if HAS_Z:
                    out += h * c

                work_row = (state_row + n) * work_slots + slot
                carry = tl.load(work + work_row + k % 2, mask=before_end, other=0.0)
                if HAS_LAST:
                    carry += tl.load(grad_last + state_row + n, mask=at_end, other=0.0)
                pull = grad_out * c
                unused, own = walk_registers_adjoint(decay, pull, tl.zeros((R, J), tl.float32), R, J, E, REVERSE)
                before, after = walk_lanes(thread_decay, own, carry, R, J, not REVERSE)
                adjoint, unused = walk_registers_adjoint(decay, pull, before, R, J, E, REVERSE)
                address = work + work_row[:, None] + (k + 1) % 2 + end_offset
                tl.store(address, after, mask=in_rows[:, None] & end_lane)

                grad_drive += adjoint * b
                grad_exponent = adjoint * kept
                grad_step += grad_exponent * slope[:, None, None]
                sum_A = sum_positions(grad_exponent * step)
                _accumulate(work, work_row + 2, in_rows, earlier, sum_A, end_offset, end_lane, J)
                if CONSTANT_B:
                    sum_B = sum_positions(adjoint * drive)
                    _accumulate(work, work_row + 3, in_rows, earlier, sum_B, end_offset, end_lane, J)
                else:
                    _accumulate_positions(grad_B + n * padded, first, padded, adjoint * drive, block > 0, J, E)
                if CONSTANT_C:
                    sum_C = sum_positions(h * grad_out)
                    _accumulate(work, work_row + 4, in_rows, earlier, sum_C, end_offset, end_lane, J)
                else:
                    _accumulate_positions(grad_C + n * padded, first, padded, h * grad_out, block > 0, J, E)
            # What this tile wrote to `work` is read by other threads than wrote it.
            tl.debug_barrier()

            grad_x = grad_drive * step + grad_out * skip[:, None, None]
            grad_raw = grad_step + grad_drive * x
            if SOFTPLUS:
                grad_raw = grad_raw * sigmoid(raw)
            store_tile(grad_u, channel * grad_dim, in_rows, first, length, grad_x, R, J, E)
            store_tile(grad_delta, channel * grad_dim, in_rows, first, length, grad_raw, R, J, E)
            if HAS_Z:
                out += x * skip[:, None, None]
                grad_gate = grad_gated * out * open_gate * (1.0 + gate * (1.0 - open_gate))
                store_tile(grad_z, channel * grad_dim, in_rows, first, length, grad_gate, R, J, E)
            if HAS_D:
                sum_D += sum_positions(grad_out * x)
            if HAS_BIAS:
                sum_bias += sum_positions(tl.where((first + within < length)[None, :, :], grad_raw, 0.0))
        sums = (chunk * batches + batch) * dim + channel
        if HAS_D:
            tl.store(grad_D + sums, sum_D, mask=in_rows)
        if HAS_BIAS:
            tl.store(grad_bias + sums, sum_bias, mask=in_rows)
