"""Backward scans of SS2D along the four routes of a map.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

import triton
import triton.language as tl

from .elementwise import LN2, LOG2_E, softplus_log2
from .routes import (
    arriving_state,
    by_column,
    load_low_rank,
    load_pair,
    projections_at,
    recur,
    recur_back,
    route_of_pair,
    steps_of,
    walk,
)

# Known alignment would make the compiler deal neighbouring channels, and steps, out to threads in vectors.
_UNALIGNED = ['x_ptr', 'x_dbl_ptr', 'grad_y_ptr', 'grad_x_rows_ptr', 'grad_x_columns_ptr', 'grad_x_dbl_ptr', 'dim']
# Whether these are multiples of 16 changes nothing: maps of any size are to run on the same compiled kernel.
_UNALIGNED += ['batches', 'height', 'width', 'magic', 'regions', 'region_tiles', 'batches_per_program', 'states']


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def scan_routes_backward(
    grad_y_ptr,
    x_ptr,
    x_dbl_ptr,
    weight_ptr,
    bias_ptr,
    A_ptr,
    D_ptr,
    state_ptr,
    end_ptr,
    sum_ptr,
    carry_ptr,
    grad_x_rows_ptr,
    grad_x_columns_ptr,
    grad_x_dbl_ptr,
    grad_parameter_ptr,
    batches,
    height,
    width,
    dim,
    magic,
    regions,
    region_tiles,
    batches_per_program,
    states,
    SUMMARY: tl.constexpr,
    R: tl.constexpr,
    RP: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    DB: tl.constexpr,
    WRAP: tl.constexpr,
    WIDE: tl.constexpr,
    EXACT: tl.constexpr,
    NVIDIA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program walks one region of a pair of opposite routes back, for DB channels of some entries of the batch.

    grad_y [B, L, dim] is the gradient of the merged map times ln 2. The adjoint state g_l = C_l * grad_y_l +
    exp(delta_{l+1} * A) * g_{l+1} is walked against the route, a tile at a time; the states of the tile are recomputed
    from the one before it, state [B, 4, states, N, dim] of `scan_routes`. As there, grad_x_rows and grad_x_columns
    [B, L, dim] are written by the first route of a pair to reach a tile and added to by the second; carry
    [B, 4, regions, N, dim] is where the adjoint state waits between tiles; and with SUMMARY only end and sum are
    written.

    Gradients that sum over channels or positions are partial sums, for torch to add up: grad_x_dbl over the channels
    of a program [blocks of channels, B, L, 4 * E]; those of the parameters over its batch entries and its region
    [groups of batches, regions, 4 * dim * (R + 1 + N)], first all of weight [4, dim, R], then bias [4, dim], then A
    [4, dim, N].
    """
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(dim, DB)
    block = pid % channel_blocks
    pair = (pid // channel_blocks) % 2
    region = (pid // channel_blocks // 2) % regions
    batch_group = pid // channel_blocks // 2 // regions
    E: tl.constexpr = R + 2 * N
    T: tl.constexpr = ROWS * SPLITS
    seqlen = height * width
    operand = tl.bfloat16 if x_ptr.dtype.element_ty == tl.bfloat16 else tl.float32

    _, _, _, _, tiles, lines = route_of_pair(pair, height, width, magic, T, WRAP)
    column = tl.arange(0, 2 * DB)
    backward = column // DB
    route = pair + 2 * backward
    # Columns beyond the last channel repeat it, with no gradient; what they store is masked.
    has_channel = block * DB + column % DB < dim
    channel = tl.minimum(block * DB + column % DB, dim - 1)
    parameter = route * dim + channel
    rank = tl.arange(0, 2 * RP)
    rank_backward = rank // RP
    rank_column = (pair + 2 * rank_backward) * E + rank % RP
    has_rank = rank % RP < R
    same_route = has_rank[:, None] & (rank_backward[:, None] == backward[None, :])
    weight = tl.load(weight_ptr + parameter[None, :] * R + (rank % RP)[:, None], mask=same_route, other=0.0)
    weight = (weight.to(tl.float32) * LOG2_E).to(operand)
    weight_transposed = tl.trans(weight)
    bias = tl.load(bias_ptr + parameter).to(tl.float32) * LOG2_E
    # The forward route of a pair brings the gradients of both skip connections.
    skip = tl.load(D_ptr + pair * dim + channel).to(tl.float32)
    skip += tl.load(D_ptr + (pair + 2) * dim + channel).to(tl.float32)
    skip = tl.where(backward == 0, skip * LOG2_E, 0.0)
    # Columns of the gradients of B and C: B and C of the forward route, B and C of the backward one.
    other = tl.arange(0, 16)
    other_backward = (other // 2) % 2
    other_column = (pair + 2 * other_backward) * E + R + (other % 2) * N
    has_other = other < 4
    to_B = tl.where((other[None, :] == 2 * backward[:, None]) & has_other[None, :], 1.0, 0.0).to(operand)
    to_C = tl.where((other[None, :] == 2 * backward[:, None] + 1) & has_other[None, :], 1.0, 0.0).to(operand)

    row = tl.arange(0, T)
    matrix_count = ((row % SPLITS) * ROWS + row // SPLITS)[:, None]
    rank_offset = steps_of(rank_backward[None, :], T, matrix_count)
    other_offset = steps_of(other_backward[None, :], T, matrix_count)
    count = tl.arange(0, SPLITS)[None, :, None] * ROWS + tl.arange(0, ROWS)[:, None, None]
    offset = steps_of(backward[None, None, :], T, count)
    split = tl.arange(0, SPLITS)[:, None]
    first_tile = region * region_tiles
    last_tile = first_tile + region_tiles - 1
    order = tl.where(backward == 0, regions - 1 - region, region)
    first_batch = batch_group * batches_per_program

    total_weight = tl.zeros([2 * DB, 2 * RP], tl.float32)
    total_bias = tl.zeros([SPLITS, 2 * DB], tl.float32)
    total_A = tl.zeros([SPLITS, 2 * DB], tl.float32)
    grad_parameter_ptr += (batch_group * regions + region).to(tl.int64) * (4 * dim * (R + 1 + N))
    grad_A_ptr = grad_parameter_ptr + 4 * dim * (R + 1) + parameter * N

    for batch_index in range(first_batch, tl.minimum(first_batch + batches_per_program, batches)):
        batch = tl.cast(batch_index, tl.int64)
        scan = batch * 4 + route
        x_batch = x_ptr + batch * seqlen * dim
        x_dbl_batch = x_dbl_ptr + batch * seqlen * (4 * E)
        grad_y_batch = grad_y_ptr + batch * seqlen * dim
        grad_x_batch = (grad_x_rows_ptr if pair == 0 else grad_x_columns_ptr) + batch * seqlen * dim
        grad_x_dbl_batch = grad_x_dbl_ptr + (tl.cast(block, tl.int64) * batches + batch) * seqlen * (4 * E)
        state_batch = state_ptr + scan * states * (N * dim) + channel
        carry_batch = carry_ptr + (scan * regions + region) * (N * dim) + channel
        end_batch = end_ptr + (scan * regions + region) * (N * dim) + channel
        carry = tl.zeros([SPLITS, 2 * DB], tl.float32)
        total = tl.zeros([ROWS, SPLITS, 2 * DB], tl.float32)
        if not SUMMARY:
            for n in range(N):
                a = tl.load(A_ptr + parameter * N + n).to(tl.float32)
                ends = end_ptr + scan * (regions * N * dim) + n * dim + channel
                sums = sum_ptr + scan * (regions * dim) + channel
                start = arriving_state(a, ends, N * dim, sums, dim, order, 1 - backward, regions, has_channel)
                if N > 1:
                    tl.store(carry_batch + n * dim, start, mask=has_channel)
                carry = tl.broadcast_to(start[None, :], [SPLITS, 2 * DB])

        # The product at the start of a tile is of what is loaded a tile ahead, so that nothing waits for it.
        rank_ptr = x_dbl_batch + rank_column[None, :]
        next_low_rank = load_low_rank(
            rank_ptr,
            has_rank,
            rank_offset,
            rank_backward[None, :],
            last_tile,
            first_tile,
            pair,
            height,
            width,
            magic,
            4 * E,
            T,
            WRAP,
            WIDE,
        )
        for i in range(0, region_tiles):
            if N > 1 or i == region_tiles // 2:
                # States pass through memory; half way each route enters tiles that the other one has written.
                tl.debug_barrier()
            position, exists = walk(
                offset, backward[None, None, :], last_tile - i, first_tile + i, pair, height, width, magic, T, WRAP
            )
            rank_position, rank_exists = walk(
                rank_offset, rank_backward[None, :], last_tile - i, first_tile + i, pair, height, width, magic, T, WRAP
            )
            position = tl.max_constancy(position, (1, 1, DB))
            if WIDE:
                position = position.to(tl.int64)
                rank_position = rank_position.to(tl.int64)
            pixel = tl.max_contiguous(position * dim + channel[None, None, :], (1, SPLITS, DB))
            grad_y = tl.load(grad_y_batch + pixel).to(tl.float32)
            rank_pixel = rank_position * (4 * E) + rank_column[None, :]
            low_rank = next_low_rank.to(operand)
            ahead = tl.minimum(i + 1, region_tiles - 1)
            next_low_rank = load_low_rank(
                rank_ptr,
                has_rank,
                rank_offset,
                rank_backward[None, :],
                last_tile - ahead,
                first_tile + ahead,
                pair,
                height,
                width,
                magic,
                4 * E,
                T,
                WRAP,
                WIDE,
            )
            # All that a tile needs is loaded before the first product, whose barriers would hold later loads back.
            if N == 1:
                B, C = load_pair(x_dbl_batch, position, route, R, E, SPLITS, 2 * DB)
            else:
                projection = projections_at(position, route * E + R, 4 * E, SPLITS, 2 * DB)
            if not SUMMARY:
                x = tl.load(x_batch + pixel).to(tl.float32)
                # What is loaded for a step that does not exist is not stored.
                second = tl.where(i >= region_tiles // 2, column >= 0, False)
                grad_x = tl.load(grad_x_batch + pixel, mask=second[None, None, :], other=0.0).to(tl.float32)
                tile = tl.where(backward == 0, last_tile - i, first_tile + i)
                has_state = tile < tiles * lines
                if N == 1:
                    state = state_batch + tile.to(tl.int64) * dim
                    start = tl.load(state[None, :] + 0 * split, mask=has_state[None, :], other=0.0)
            z = tl.dot(low_rank, weight, input_precision=PRECISION)
            z, grad_y = by_column(z, grad_y, ROWS, SPLITS, 2 * DB)
            z += bias[None, None, :]
            z = tl.where(exists, z, -1e4)
            delta = softplus_log2(z, EXACT, NVIDIA)
            grad_y = tl.where(exists & has_channel[None, None, :], grad_y, 0.0)
            if SUMMARY:
                total += delta
                for n in range(N):
                    a = tl.load(A_ptr + parameter * N + n).to(tl.float32)
                    if N > 1:
                        C = tl.load(x_dbl_batch + projection + (N + n)).to(tl.float32)
                        started = tl.where(i > 0, has_channel, False)
                        carry = tl.load(end_batch[None, :] + n * dim + 0 * split, mask=started[None, :], other=0.0)
                    decay = tl.exp2(delta * a[None, None, :])
                    after, carry = recur_back(decay, C * grad_y, carry, ROWS, SPLITS, 2 * DB)
                    tl.store(end_batch[None, :] + n * dim + 0 * split, carry, mask=has_channel[None, :] & (split == 0))
            else:
                delta_x = delta * x
                grad_input = tl.zeros([ROWS, SPLITS, 2 * DB], tl.float32)
                grad_delta = tl.zeros([ROWS, SPLITS, 2 * DB], tl.float32)
                other_position, other_exists = walk(
                    other_offset,
                    other_backward[None, :],
                    last_tile - i,
                    first_tile + i,
                    pair,
                    height,
                    width,
                    magic,
                    T,
                    WRAP,
                )
                if WIDE:
                    other_position = other_position.to(tl.int64)
                other_target = grad_x_dbl_batch + (other_position * (4 * E) + other_column[None, :])
                for n in range(N):
                    a = tl.load(A_ptr + parameter * N + n).to(tl.float32)
                    if N > 1:
                        B = tl.load(x_dbl_batch + projection + n).to(tl.float32)
                        C = tl.load(x_dbl_batch + projection + (N + n)).to(tl.float32)
                        state = state_batch + (tile.to(tl.int64) * N + n) * dim
                        start = tl.load(state[None, :] + 0 * split, mask=has_state[None, :], other=0.0)
                        carry = tl.load(
                            carry_batch[None, :] + n * dim + 0 * split, mask=has_channel[None, :], other=0.0
                        )
                    decay = tl.exp2(delta * a[None, None, :])
                    h, before, starts, end = recur(decay, delta_x * B, start, ROWS, SPLITS, 2 * DB)
                    arriving = C * grad_y
                    after, carry = recur_back(decay, arriving, carry, ROWS, SPLITS, 2 * DB)
                    g = arriving + after
                    if N > 1:
                        target = carry_batch[None, :] + n * dim + 0 * split
                        tl.store(target, carry, mask=has_channel[None, :] & (split == 0))

                    grad_exponent = g * decay * before
                    grad_delta += grad_exponent * (a * LN2)[None, None, :]
                    grad_input += g * B
                    grad_B = tl.reshape((g * delta_x).to(operand), [T, 2 * DB])
                    grad_C = tl.reshape((grad_y * h).to(operand), [T, 2 * DB])
                    others = tl.dot(grad_B, to_B, input_precision=PRECISION)
                    others = tl.dot(grad_C, to_C, others, input_precision=PRECISION)
                    stored = other_exists & has_other[None, :]
                    tl.store(other_target + n, others.to(grad_x_dbl_ptr.dtype.element_ty), mask=stored)

                    grad_a = tl.sum(grad_exponent * delta, axis=0)
                    if N == 1:
                        total_A += grad_a
                    else:
                        grad_a = tl.sum(grad_a, axis=0) * LN2
                        earlier = tl.where((i > 0) | (batch_index > first_batch), has_channel, False)
                        grad_a += tl.load(grad_A_ptr + n, mask=earlier, other=0.0)
                        tl.store(grad_A_ptr + n, grad_a, mask=has_channel)

                # delta is log2(1 + 2**z), whose derivative is 2**(z - delta).
                grad_z = tl.exp2(tl.minimum(z - delta, 0.0)) * (grad_delta + grad_input * x)
                total_bias += tl.sum(grad_z, axis=0)
                grad_z = tl.reshape(grad_z.to(operand), [T, 2 * DB])
                total_weight = tl.dot(tl.trans(grad_z), low_rank, total_weight, input_precision=PRECISION)
                grad_rank = tl.dot(grad_z, weight_transposed, input_precision=PRECISION)
                grad_rank = grad_rank.to(grad_x_dbl_ptr.dtype.element_ty)
                tl.store(grad_x_dbl_batch + rank_pixel, grad_rank, mask=rank_exists & has_rank[None, :])

                grad_x += grad_input * delta + grad_y * skip[None, None, :]
                grad_x = grad_x.to(x_ptr.dtype.element_ty)
                tl.store(grad_x_batch + pixel, grad_x, mask=exists & has_channel[None, None, :])
        if SUMMARY:
            total = tl.sum(tl.sum(total, axis=0), axis=0)
            tl.store(sum_ptr + (scan * regions + region) * dim + channel, total, mask=has_channel)

    if not SUMMARY:
        if N == 1:
            tl.store(grad_A_ptr, tl.sum(total_A, axis=0) * LN2, mask=has_channel)
        grad_bias = tl.sum(total_bias, axis=0) * LOG2_E
        tl.store(grad_parameter_ptr + 4 * dim * R + parameter, grad_bias, mask=has_channel)
        matrix = parameter[:, None] * R + (rank % RP)[None, :]
        stored = has_channel[:, None] & tl.trans(same_route)
        tl.store(grad_parameter_ptr + matrix, total_weight * LOG2_E, mask=stored)
