"""Forward scans of SS2D along the four routes of a map.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

import triton
import triton.language as tl

from .elementwise import LOG2_E, softplus_log2
from .routes import (
    arriving_state,
    by_column,
    line_of,
    load_low_rank,
    load_pair,
    projections_at,
    recur,
    route_of_pair,
    steps_of,
    walk,
)

# Known alignment would make the compiler deal neighbouring channels, and steps, out to threads in vectors.
_UNALIGNED = ['x_ptr', 'x_dbl_ptr', 'y_rows_ptr', 'y_columns_ptr', 'dim']
# Whether these are multiples of 16 changes nothing: maps of any size are to run on the same compiled kernel.
_UNALIGNED += ['height', 'width', 'magic', 'regions', 'region_tiles', 'states']


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def scan_routes(
    x_ptr,
    x_dbl_ptr,
    weight_ptr,
    bias_ptr,
    A_ptr,
    y_rows_ptr,
    y_columns_ptr,
    state_ptr,
    carry_ptr,
    end_ptr,
    sum_ptr,
    height,
    width,
    dim,
    magic,
    regions,
    region_tiles,
    states,
    STATES: tl.constexpr,
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
    """One program walks one region of a pair of opposite routes, for one entry of the batch and DB channels.

    y_rows and y_columns [B, L, dim] get their pair's sum of <C, h> / ln 2: of the two routes the first to reach a
    tile writes it, the second adds to it. state [B, 4, states, N, dim] gets the states / ln 2 before each of the
    STATES tiles of the backward pass that a tile holds: none, one or SPLITS; carry [B, 4, regions, N, dim] is where
    states wait between tiles. With SUMMARY only the sum of delta / ln 2 over the region [B, 4, regions, dim] and
    the state / ln 2 at its end [B, 4, regions, N, dim], from a start at zero, are written; without, they are read.
    """
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(dim, DB)
    block = pid % channel_blocks
    pair = (pid // channel_blocks) % 2
    region = (pid // channel_blocks // 2) % regions
    batch = (pid // channel_blocks // 2 // regions).to(tl.int64)
    E: tl.constexpr = R + 2 * N
    T: tl.constexpr = ROWS * SPLITS
    seqlen = height * width

    line, _, _, magic, tiles, lines = route_of_pair(pair, height, width, magic, T, WRAP)

    column = tl.arange(0, 2 * DB)
    backward = column // DB
    route = pair + 2 * backward
    # Columns beyond the last channel repeat it; only what they store is masked.
    has_channel = block * DB + column % DB < dim
    channel = tl.minimum(block * DB + column % DB, dim - 1)
    parameter = route * dim + channel

    # The projections of dt of both routes are one product with a block-diagonal matrix.
    rank = tl.arange(0, 2 * RP)
    rank_backward = rank // RP
    rank_column = (pair + 2 * rank_backward) * E + rank % RP
    has_rank = rank % RP < R
    same_route = has_rank[:, None] & (rank_backward[:, None] == backward[None, :])
    x_ptr += batch * seqlen * dim
    y_ptr = (y_rows_ptr if pair == 0 else y_columns_ptr) + batch * seqlen * dim
    x_dbl_ptr += batch * seqlen * (4 * E)
    weight = tl.load(weight_ptr + parameter[None, :] * R + (rank % RP)[:, None], mask=same_route, other=0.0)
    weight = (weight.to(tl.float32) * LOG2_E).to(x_dbl_ptr.dtype.element_ty)
    bias = tl.load(bias_ptr + parameter).to(tl.float32) * LOG2_E

    scan = batch * 4 + route
    state_ptr += scan * states * (N * dim) + channel
    carry_ptr += (scan * regions + region) * (N * dim) + channel
    order = tl.where(backward == 0, region, regions - 1 - region)
    split = tl.arange(0, SPLITS)[:, None]
    carry = tl.zeros([SPLITS, 2 * DB], tl.float32)
    if SUMMARY:
        end_ptr += (scan * regions + region) * (N * dim) + channel
    else:
        for n in range(N):
            a = tl.load(A_ptr + parameter * N + n).to(tl.float32)
            ends = end_ptr + scan * (regions * N * dim) + n * dim + channel
            sums = sum_ptr + scan * (regions * dim) + channel
            start = arriving_state(a, ends, N * dim, sums, dim, order, backward, regions, has_channel)
            if N > 1:
                tl.store(carry_ptr + n * dim, start, mask=has_channel)
            carry = tl.broadcast_to(start[None, :], [SPLITS, 2 * DB])
    if N == 1:
        a = tl.load(A_ptr + parameter).to(tl.float32)
    total = tl.zeros([ROWS, SPLITS, 2 * DB], tl.float32)
    row = tl.arange(0, T)
    rank_offset = steps_of(rank_backward[None, :], T, ((row % SPLITS) * ROWS + row // SPLITS)[:, None])
    count = tl.arange(0, SPLITS)[None, :, None] * ROWS + tl.arange(0, ROWS)[:, None, None]
    offset = steps_of(backward[None, None, :], T, count)
    first_tile = region * region_tiles
    last_tile = first_tile + region_tiles - 1
    # The product at the start of a tile is of what is loaded a tile ahead, so that nothing waits for it.
    rank_ptr = x_dbl_ptr + rank_column[None, :]
    rank_backward = rank_backward[None, :]
    next_low_rank = load_low_rank(
        rank_ptr,
        has_rank,
        rank_offset,
        rank_backward,
        first_tile,
        last_tile,
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
        if not SUMMARY or N > 1:
            # Half way each route enters tiles that the other one has written; and states pass through memory.
            if N > 1 or i == region_tiles // 2:
                tl.debug_barrier()
        position, exists = walk(
            offset, backward[None, None, :], first_tile + i, last_tile - i, pair, height, width, magic, T, WRAP
        )
        position = tl.max_constancy(position, (1, 1, DB))
        if STATES > 0:
            state_tile = tl.where(backward == 0, first_tile + i, last_tile - i)
            state_tile = tl.where(state_tile < tiles * lines, state_tile, -1)[None, :]
            if STATES > 1:
                # A tile starts STATES of the backward pass's tiles, of which the last of a line may hold no step.
                part = tl.arange(0, STATES)[:, None]
                part = tl.where(backward[None, :] == 0, part, STATES - 1 - part)
                line_of_tile = state_tile * 0 if WRAP else line_of(state_tile, magic, tiles)
                part += (state_tile - line_of_tile * tiles) * STATES
                tiles_of_line = tl.cdiv(seqlen if WRAP else line, T // STATES)
                state_part = line_of_tile * tiles_of_line + part
                state_tile = tl.where((state_tile >= 0) & (part < tiles_of_line), state_part, -1)
        if WIDE:
            position = position.to(tl.int64)
        pixel = tl.max_contiguous(position * dim + channel[None, None, :], (1, SPLITS, DB))
        x = tl.load(x_ptr + pixel).to(tl.float32)
        low_rank = next_low_rank
        ahead = tl.minimum(i + 1, region_tiles - 1)
        next_low_rank = load_low_rank(
            rank_ptr,
            has_rank,
            rank_offset,
            rank_backward,
            first_tile + ahead,
            last_tile - ahead,
            pair,
            height,
            width,
            magic,
            4 * E,
            T,
            WRAP,
            WIDE,
        )
        # All that a tile needs is loaded before the product, whose barriers would hold later loads back.
        if N == 1:
            B, C = load_pair(x_dbl_ptr, position, route, R, E, SPLITS, 2 * DB)
        else:
            projection = projections_at(position, route * E + R, 4 * E, SPLITS, 2 * DB)
        if not SUMMARY:
            # What is loaded for a step that does not exist is not stored.
            second = tl.where(i >= region_tiles // 2, column >= 0, False)
            y = tl.load(y_ptr + pixel, mask=second[None, None, :], other=0.0).to(tl.float32)
        delta = tl.dot(low_rank, weight, input_precision=PRECISION)
        delta, x = by_column(delta, x, ROWS, SPLITS, 2 * DB)
        delta += bias[None, None, :]
        delta = softplus_log2(tl.where(exists, delta, -1e4), EXACT, NVIDIA)
        delta_x = delta * x
        if SUMMARY:
            total += delta
        for n in range(N):
            if N > 1:
                a = tl.load(A_ptr + parameter * N + n).to(tl.float32)
                B = tl.load(x_dbl_ptr + projection + n).to(tl.float32)
            if N > 1 and SUMMARY:
                started = tl.where(i > 0, has_channel, False)
                carry = tl.load(end_ptr[None, :] + n * dim + 0 * split, mask=started[None, :], other=0.0)
            elif N > 1:
                carry = tl.load(carry_ptr[None, :] + n * dim + 0 * split)
            decay = tl.exp2(delta * a[None, None, :])
            before_tile = carry
            h, before, starts, carry = recur(decay, delta_x * B, carry, ROWS, SPLITS, 2 * DB)
            if SUMMARY:
                tl.store(end_ptr[None, :] + n * dim + 0 * split, carry, mask=has_channel[None, :] & (split == 0))
            else:
                if N > 1:
                    C = tl.load(x_dbl_ptr + projection + (N + n)).to(tl.float32)
                y += C * h
                if N > 1:
                    target = carry_ptr[None, :] + n * dim + 0 * split
                    tl.store(target, carry, mask=has_channel[None, :] & (split == 0))
                if STATES > 0:
                    stored = has_channel[None, :] & (state_tile >= 0) & (split < STATES)
                    target = state_ptr[None, :] + (state_tile.to(tl.int64) * N + n) * dim + 0 * split
                    tl.store(target, before_tile if STATES == 1 else starts, mask=stored)
        if not SUMMARY:
            tl.store(y_ptr + pixel, y.to(y_ptr.dtype.element_ty), mask=exists & has_channel[None, None, :])
    if SUMMARY:
        total = tl.sum(tl.sum(total, axis=0), axis=0)
        tl.store(sum_ptr + (scan * regions + region) * dim + channel, total, mask=has_channel)
