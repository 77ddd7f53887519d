"""Backward scans of SS2D along the four routes of a map.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

from .._device import LN2, LOG2_E, softplus_log2
from .._launch import tl, triton
from .routes import (
    arriving_state,
    by_column,
    load_low_rank,
    load_pair,
    offsets_of,
    projections_at,
    recur,
    recur_back,
    route_of_pair,
    walk,
)

# Known alignment would make the compiler deal neighbouring channels, and steps, out to threads in vectors.
_UNALIGNED = ['x', 'x_dbl', 'grad_y', 'grad_x', 'grad_x_dbl', 'dim']
# Whether these are multiples of 16 changes nothing: maps of any size run on the same compiled kernel.
_UNALIGNED += ['batches', 'height', 'width', 'magic', 'chunks', 'chunk_tiles', 'program_batches', 'num_states']


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def scan_backward_kernel(
    grad_y,  # [B, L, D]: ln 2 times the gradient of the merged map
    x,  # [B, L, D]
    x_dbl,  # [B, L, 4, R + 2N]
    dt_weight,  # [4, D, R]
    dt_bias,  # [4, D]
    A,  # [4, D, N]
    D,  # [4, D]
    states,  # [B, 4, num_states, N, D]: states / ln 2 before each tile, of `scan_kernel`
    carries,  # [B, 4, chunks, N, D]: where adjoint states wait between tiles
    ends,  # [B, 4, chunks, N, D]: adjoint state at the end of a chunk from a start at zero
    sums,  # [B, 4, chunks, D]: sum of dt / ln 2 over a chunk
    grad_x,  # [2, B, L, D]: written, by the routes by rows, and by those by columns
    grad_x_dbl,  # [channel blocks, B, L, 4, R + 2N]: written, partial sums over the channels of a program
    grad_parameters,  # [batch groups, chunks, 4 * D * (R + 1 + N)]: written, partial sums: dt_weight, dt_bias, A
    batches,
    height,
    width,
    dim,
    magic,
    chunks,
    chunk_tiles,
    program_batches,
    num_states,
    SUMMARY: tl.constexpr,
    LOG_A: tl.constexpr,
    ranks,  # `Ranks` of constants
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """One program walks one chunk of a pair of opposite routes back, for BLOCK_D channels of some entries of the batch.

    The adjoint state g_l = C_l * grad_y_l + exp(dt_{l+1} * A) * g_{l+1} is walked against the route, a tile at a time;
    the states of the tile are recomputed from the saved one before it. As in `scan_kernel`, the first route of a pair
    to reach a tile writes grad_x, the second adds to it, and with SUMMARY only `ends` and `sums` are written. With
    LOG_A the gradient of A is replaced by that of log(-A).
    """
    R: tl.constexpr = ranks.rank
    BLOCK_R: tl.constexpr = ranks.block_r
    N: tl.constexpr = ranks.dstate
    STEPS: tl.constexpr = tile.steps
    SPLITS: tl.constexpr = tile.splits
    BLOCK_D: tl.constexpr = tile.block_d
    WRAP: tl.constexpr = flags.wrap
    WIDE: tl.constexpr = flags.wide
    PRECISION: tl.constexpr = flags.precision
    plane = (height, width, magic)
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(dim, BLOCK_D)
    block = pid % channel_blocks
    pair = (pid // channel_blocks) % 2
    chunk = (pid // channel_blocks // 2) % chunks
    batch_group = pid // channel_blocks // 2 // chunks
    E: tl.constexpr = R + 2 * N
    BLOCK_L: tl.constexpr = STEPS * SPLITS
    seqlen = height * width
    operand = tl.bfloat16 if x.dtype.element_ty == tl.bfloat16 else tl.float32

    _, _, _, _, tiles, lines = route_of_pair(pair, plane, BLOCK_L, WRAP)
    column = tl.arange(0, 2 * BLOCK_D)
    backward = column // BLOCK_D
    route = pair + 2 * backward
    # Columns beyond the last channel repeat it, with no gradient; what they store is masked.
    has_channel = block * BLOCK_D + column % BLOCK_D < dim
    channel = tl.minimum(block * BLOCK_D + column % BLOCK_D, dim - 1)
    parameter = route * dim + channel
    rank = tl.arange(0, 2 * BLOCK_R)
    rank_backward = rank // BLOCK_R
    rank_column = (pair + 2 * rank_backward) * E + rank % BLOCK_R
    has_rank = rank % BLOCK_R < R
    same_route = has_rank[:, None] & (rank_backward[:, None] == backward[None, :])
    place = parameter[None, :] * R + (rank % BLOCK_R)[:, None]
    weight = tl.load(dt_weight + place, mask=same_route, other=0.0)  # [2 * BLOCK_R, 2 * BLOCK_D]
    weight = (weight.to(tl.float32) * LOG2_E).to(operand)
    weight_transposed = tl.trans(weight)
    bias = tl.load(dt_bias + parameter).to(tl.float32) * LOG2_E  # [2 * BLOCK_D]
    # The forward route of a pair brings the gradients of both skip connections.
    skip = tl.load(D + pair * dim + channel).to(tl.float32)  # [2 * BLOCK_D]
    skip += tl.load(D + (pair + 2) * dim + channel).to(tl.float32)
    skip = tl.where(backward == 0, skip * LOG2_E, 0.0)
    # Columns of the gradients of B and C: B and C of the forward route, B and C of the backward one.
    other = tl.arange(0, 16)
    other_backward = (other // 2) % 2
    other_column = (pair + 2 * other_backward) * E + R + (other % 2) * N
    has_other = other < 4
    to_B = tl.where((other[None, :] == 2 * backward[:, None]) & has_other[None, :], 1.0, 0.0).to(operand)
    to_C = tl.where((other[None, :] == 2 * backward[:, None] + 1) & has_other[None, :], 1.0, 0.0).to(operand)

    row = tl.arange(0, BLOCK_L)
    matrix_count = ((row % SPLITS) * STEPS + row // SPLITS)[:, None]
    rank_offset = offsets_of(rank_backward[None, :], matrix_count, BLOCK_L)
    other_offset = offsets_of(other_backward[None, :], matrix_count, BLOCK_L)
    count = tl.arange(0, SPLITS)[None, :, None] * STEPS + tl.arange(0, STEPS)[:, None, None]
    offset = offsets_of(backward[None, None, :], count, BLOCK_L)
    split = tl.arange(0, SPLITS)[:, None]
    first_tile = chunk * chunk_tiles
    last_tile = first_tile + chunk_tiles - 1
    order = tl.where(backward == 0, chunks - 1 - chunk, chunk)
    first_batch = batch_group * program_batches

    total_weight = tl.zeros([2 * BLOCK_D, 2 * BLOCK_R], tl.float32)
    total_bias = tl.zeros([SPLITS, 2 * BLOCK_D], tl.float32)
    total_A = tl.zeros([SPLITS, 2 * BLOCK_D], tl.float32)
    grad_parameters += (batch_group * chunks + chunk).to(tl.int64) * (4 * dim * (R + 1 + N))
    grad_A = grad_parameters + 4 * dim * (R + 1) + parameter * N

    for batch_index in range(first_batch, tl.minimum(first_batch + program_batches, batches)):
        batch = tl.cast(batch_index, tl.int64)
        scan = batch * 4 + route
        x_batch = x + batch * seqlen * dim
        x_dbl_batch = x_dbl + batch * seqlen * (4 * E)
        grad_y_batch = grad_y + batch * seqlen * dim
        grad_x_batch = grad_x + (pair * batches + batch) * seqlen * dim
        grad_x_dbl_batch = grad_x_dbl + (tl.cast(block, tl.int64) * batches + batch) * seqlen * (4 * E)
        state_batch = states + scan * num_states * (N * dim) + channel
        carry_batch = carries + (scan * chunks + chunk) * (N * dim) + channel
        end_batch = ends + (scan * chunks + chunk) * (N * dim) + channel
        carry = tl.zeros([SPLITS, 2 * BLOCK_D], tl.float32)
        total = tl.zeros([STEPS, SPLITS, 2 * BLOCK_D], tl.float32)
        if not SUMMARY:
            for n in range(N):
                a = tl.load(A + parameter * N + n).to(tl.float32)  # [2 * BLOCK_D]
                first_end = ends + scan * (chunks * N * dim) + n * dim + channel
                first_sum = sums + scan * (chunks * dim) + channel
                start = arriving_state(a, first_end, N * dim, first_sum, dim, order, 1 - backward, chunks, has_channel)
                if N > 1:
                    tl.store(carry_batch + n * dim, start, mask=has_channel)
                carry = tl.broadcast_to(start[None, :], [SPLITS, 2 * BLOCK_D])

        # The product at the start of a tile is of what is loaded a tile ahead, so that nothing waits for it.
        low_ranks = x_dbl_batch + rank_column[None, :]
        next_low_rank = load_low_rank(
            low_ranks,
            has_rank,
            rank_offset,
            rank_backward[None, :],
            last_tile,
            first_tile,
            pair,
            plane,
            4 * E,
            BLOCK_L,
            WRAP,
            WIDE,
        )
        for i in range(0, chunk_tiles):
            if N > 1 or i == chunk_tiles // 2:
                # States pass through memory; half way each route enters tiles that the other one has written.
                tl.debug_barrier()
            position, exists = walk(
                offset, backward[None, None, :], last_tile - i, first_tile + i, pair, plane, BLOCK_L, WRAP
            )
            rank_position, rank_exists = walk(
                rank_offset, rank_backward[None, :], last_tile - i, first_tile + i, pair, plane, BLOCK_L, WRAP
            )
            position = tl.max_constancy(position, (1, 1, BLOCK_D))
            if WIDE:
                position = position.to(tl.int64)
                rank_position = rank_position.to(tl.int64)
            pixel = tl.max_contiguous(position * dim + channel[None, None, :], (1, SPLITS, BLOCK_D))
            grad_out = tl.load(grad_y_batch + pixel).to(tl.float32)  # [STEPS, SPLITS, 2 * BLOCK_D]
            rank_pixel = rank_position * (4 * E) + rank_column[None, :]
            low_rank = next_low_rank.to(operand)
            ahead = tl.minimum(i + 1, chunk_tiles - 1)
            next_low_rank = load_low_rank(
                low_ranks,
                has_rank,
                rank_offset,
                rank_backward[None, :],
                last_tile - ahead,
                first_tile + ahead,
                pair,
                plane,
                4 * E,
                BLOCK_L,
                WRAP,
                WIDE,
            )
            # All that a tile needs is loaded before the first product, whose barriers would hold later loads back.
            if N == 1:
                B, C = load_pair(x_dbl_batch, position, route, R, E, SPLITS, 2 * BLOCK_D)
            else:
                projection = projections_at(position, route * E + R, 4 * E, SPLITS, 2 * BLOCK_D)
            if not SUMMARY:
                u = tl.load(x_batch + pixel).to(tl.float32)  # [STEPS, SPLITS, 2 * BLOCK_D]
                # What is loaded for a step that does not exist is not stored.
                second = tl.where(i >= chunk_tiles // 2, column >= 0, False)
                grad_u = tl.load(grad_x_batch + pixel, mask=second[None, None, :], other=0.0).to(tl.float32)
                here = tl.where(backward == 0, last_tile - i, first_tile + i)
                has_state = here < tiles * lines
                if N == 1:
                    state = state_batch + here.to(tl.int64) * dim
                    start = tl.load(state[None, :] + 0 * split, mask=has_state[None, :], other=0.0)
            z = tl.dot(low_rank, weight, input_precision=PRECISION)
            z, grad_out = by_column(z, grad_out, STEPS, SPLITS, 2 * BLOCK_D)
            z += bias[None, None, :]
            z = tl.where(exists, z, -1e4)
            dt = softplus_log2(z, flags.exact, flags.nvidia)
            grad_out = tl.where(exists & has_channel[None, None, :], grad_out, 0.0)
            if SUMMARY:
                total += dt
                for n in range(N):
                    a = tl.load(A + parameter * N + n).to(tl.float32)  # [2 * BLOCK_D]
                    if N > 1:
                        C = tl.load(x_dbl_batch + projection + (N + n)).to(tl.float32)  # [STEPS, SPLITS, 2 * BLOCK_D]
                        started = tl.where(i > 0, has_channel, False)
                        carry = tl.load(end_batch[None, :] + n * dim + 0 * split, mask=started[None, :], other=0.0)
                    decay = tl.exp2(dt * a[None, None, :])
                    after, carry = recur_back(decay, C * grad_out, carry, STEPS, SPLITS, 2 * BLOCK_D)
                    tl.store(end_batch[None, :] + n * dim + 0 * split, carry, mask=has_channel[None, :] & (split == 0))
            else:
                dt_u = dt * u
                grad_input = tl.zeros([STEPS, SPLITS, 2 * BLOCK_D], tl.float32)
                grad_dt = tl.zeros([STEPS, SPLITS, 2 * BLOCK_D], tl.float32)
                other_position, other_exists = walk(
                    other_offset, other_backward[None, :], last_tile - i, first_tile + i, pair, plane, BLOCK_L, WRAP
                )
                if WIDE:
                    other_position = other_position.to(tl.int64)
                other_target = grad_x_dbl_batch + (other_position * (4 * E) + other_column[None, :])
                for n in range(N):
                    a = tl.load(A + parameter * N + n).to(tl.float32)  # [2 * BLOCK_D]
                    if N > 1:
                        B = tl.load(x_dbl_batch + projection + n).to(tl.float32)  # [STEPS, SPLITS, 2 * BLOCK_D]
                        C = tl.load(x_dbl_batch + projection + (N + n)).to(tl.float32)
                        state = state_batch + (here.to(tl.int64) * N + n) * dim
                        start = tl.load(state[None, :] + 0 * split, mask=has_state[None, :], other=0.0)
                        carry = tl.load(
                            carry_batch[None, :] + n * dim + 0 * split, mask=has_channel[None, :], other=0.0
                        )
                    decay = tl.exp2(dt * a[None, None, :])
                    h, before, starts, end = recur(decay, dt_u * B, start, STEPS, SPLITS, 2 * BLOCK_D)
                    arriving = C * grad_out
                    after, carry = recur_back(decay, arriving, carry, STEPS, SPLITS, 2 * BLOCK_D)
                    g = arriving + after
                    if N > 1:
                        target = carry_batch[None, :] + n * dim + 0 * split
                        tl.store(target, carry, mask=has_channel[None, :] & (split == 0))

                    grad_exponent = g * decay * before
                    grad_dt += grad_exponent * (a * LN2)[None, None, :]
                    grad_input += g * B
                    grad_B = tl.reshape((g * dt_u).to(operand), [BLOCK_L, 2 * BLOCK_D])
                    grad_C = tl.reshape((grad_out * h).to(operand), [BLOCK_L, 2 * BLOCK_D])
                    others = tl.dot(grad_B, to_B, input_precision=PRECISION)
                    others = tl.dot(grad_C, to_C, others, input_precision=PRECISION)
                    stored = other_exists & has_other[None, :]
                    tl.store(other_target + n, others.to(grad_x_dbl.dtype.element_ty), mask=stored)

                    grad_a = tl.sum(grad_exponent * dt, axis=0)
                    if N == 1:
                        total_A += grad_a
                    else:
                        grad_a = tl.sum(grad_a, axis=0) * LN2
                        if LOG_A:
                            grad_a *= a
                        earlier = tl.where((i > 0) | (batch_index > first_batch), has_channel, False)
                        grad_a += tl.load(grad_A + n, mask=earlier, other=0.0)
                        tl.store(grad_A + n, grad_a, mask=has_channel)

                # dt is log2(1 + 2**z), whose derivative is 2**(z - dt).
                grad_z = tl.exp2(tl.minimum(z - dt, 0.0)) * (grad_dt + grad_input * u)
                total_bias += tl.sum(grad_z, axis=0)
                grad_z = tl.reshape(grad_z.to(operand), [BLOCK_L, 2 * BLOCK_D])
                total_weight = tl.dot(tl.trans(grad_z), low_rank, total_weight, input_precision=PRECISION)
                grad_rank = tl.dot(grad_z, weight_transposed, input_precision=PRECISION)
                grad_rank = grad_rank.to(grad_x_dbl.dtype.element_ty)
                tl.store(grad_x_dbl_batch + rank_pixel, grad_rank, mask=rank_exists & has_rank[None, :])

                grad_u += grad_input * dt + grad_out * skip[None, None, :]
                grad_u = grad_u.to(x.dtype.element_ty)
                tl.store(grad_x_batch + pixel, grad_u, mask=exists & has_channel[None, None, :])
        if SUMMARY:
            total = tl.sum(tl.sum(total, axis=0), axis=0)
            tl.store(sums + (scan * chunks + chunk) * dim + channel, total, mask=has_channel)

    if not SUMMARY:
        if N == 1:
            grad_a = tl.sum(total_A, axis=0) * LN2
            if LOG_A:
                grad_a *= tl.load(A + parameter).to(tl.float32)
            tl.store(grad_A, grad_a, mask=has_channel)
        grad_bias = tl.sum(total_bias, axis=0) * LOG2_E
        tl.store(grad_parameters + 4 * dim * R + parameter, grad_bias, mask=has_channel)
        matrix = parameter[:, None] * R + (rank % BLOCK_R)[None, :]
        stored = has_channel[:, None] & tl.trans(same_route)
        tl.store(grad_parameters + matrix, total_weight * LOG2_E, mask=stored)


@triton.jit
def join_kernel(
    x_parts,  # [2, x_size]: the first part is overwritten by the sum
    x_dbl_parts,  # [blocks, x_dbl_size]
    x_dbl,  # [x_dbl_size]: written, the sum over the blocks
    x_size,
    x_dbl_size,
    blocks,
    BLOCK: tl.constexpr,
):
    """One program sums up a block of the gradient of x, or, beyond them, of that of x_dbl."""
    x_programs = tl.cdiv(x_size, BLOCK)
    pid = tl.program_id(0)
    if pid < x_programs:
        index = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < x_size
        total = tl.load(x_parts + index, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
        total += tl.load(x_parts + tl.cast(x_size, tl.int64) + index, mask=mask, other=0.0).to(tl.float32)
        tl.store(x_parts + index, total.to(x_parts.dtype.element_ty), mask=mask)
    else:
        index = (pid - x_programs).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = index < x_dbl_size
        total = tl.zeros([BLOCK], tl.float32)
        for _ in range(blocks):
            total += tl.load(x_dbl_parts + index, mask=mask, other=0.0).to(tl.float32)  # [BLOCK]
            x_dbl_parts += x_dbl_size
        tl.store(x_dbl + index, total.to(x_dbl.dtype.element_ty), mask=mask)
