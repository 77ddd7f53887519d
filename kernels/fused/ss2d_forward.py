"""Forward scans of SS2D along the four routes of a map.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

import triton
import triton.language as tl

from .elementwise import softplus_log2
from .routes import by_column, recur, route_of_pair, walk

# Known alignment would make the compiler deal neighbouring channels, and steps, out to threads in vectors.
_UNALIGNED = ['x_ptr', 'x_dbl_ptr', 'y_rows_ptr', 'y_columns_ptr', 'dim']


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
    R: tl.constexpr,
    RP: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    DB: tl.constexpr,
    STATES: tl.constexpr,
    SUMMARY: tl.constexpr,
    WRAP: tl.constexpr,
    EVEN: tl.constexpr,
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

    line, step, jump, magic, tiles, lines = route_of_pair(pair, height, width, magic, T, WRAP)

    column = tl.arange(0, 2 * DB)
    backward = column // DB
    route = pair + 2 * backward
    channel = block * DB + column % DB
    has_channel = channel >= 0 if EVEN else channel < dim
    parameter = route * dim + tl.where(has_channel, channel, dim - 1)

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
    weight = (weight.to(tl.float32) * 1.4426950408889634).to(x_dbl_ptr.dtype.element_ty)
    bias = tl.load(bias_ptr + parameter).to(tl.float32) * 1.4426950408889634

    scan = batch * 4 + route
    state_ptr += scan * (states * N * dim) + channel
    carry_ptr += (scan * regions + region) * (N * dim) + channel
    order = tl.where(backward == 0, region, regions - 1 - region)
    carry = tl.zeros([2 * DB], tl.float32)
    if SUMMARY:
        end_ptr += (scan * regions + region) * (N * dim) + channel
    else:
        for n in range(N):
            a = tl.load(A_ptr + parameter * N + n).to(tl.float32)
            carry = tl.zeros([2 * DB], tl.float32)
            for before in range(0, regions - 1):
                source = tl.where(backward == 0, before, regions - 1 - before)
                reached = has_channel & (before < order)
                total = tl.load(sum_ptr + (scan * regions + source) * dim + channel, mask=reached, other=0.0)
                end = tl.load(end_ptr + ((scan * regions + source) * N + n) * dim + channel, mask=reached, other=0.0)
                carry = tl.exp2(total * a) * carry + end
            if N > 1:
                tl.store(carry_ptr + n * dim, carry, mask=has_channel)
    total = tl.zeros([2 * DB], tl.float32)
    row = tl.arange(0, T)
    rank_steps = ((row % SPLITS) * ROWS + row // SPLITS)[:, None]
    steps = tl.arange(0, SPLITS)[None, :, None] * ROWS + tl.arange(0, ROWS)[:, None, None]
    for i in range(0, region_tiles):
        if not SUMMARY or N > 1:
            # Half way each route enters tiles that the other one has written; and states pass through memory.
            if N > 1 or i == region_tiles // 2:
                tl.debug_barrier()
        local_tile = tl.where(backward == 0, i, region_tiles - 1 - i)
        tile = region * region_tiles + local_tile
        rank_tile = region * region_tiles + tl.where(rank_backward == 0, i, region_tiles - 1 - i)
        position, exists = walk(
            steps,
            tile[None, None, :],
            backward[None, None, :],
            seqlen,
            line,
            step,
            jump,
            magic,
            tiles,
            lines,
            T,
            WRAP,
        )
        rank_position, rank_exists = walk(
            rank_steps,
            rank_tile[None, :],
            rank_backward[None, :],
            seqlen,
            line,
            step,
            jump,
            magic,
            tiles,
            lines,
            T,
            WRAP,
        )
        position = tl.max_constancy(position, (1, 1, DB))
        if STATES > 0:
            # A tile starts STATES of the backward pass's tiles, of which the last of a line may hold no step.
            part = tl.arange(0, STATES)[:, None]
            part = tl.where(backward[None, :] == 0, part, STATES - 1 - part)
            tile_of_line = (tile % tiles)[None, :] * STATES + part
            tiles_of_line = tl.cdiv(seqlen if WRAP else line, T // STATES)
            state_tile = (tile // tiles)[None, :] * tiles_of_line + tile_of_line
            state_tile = tl.where((tile_of_line < tiles_of_line) & (tile < tiles * lines)[None, :], state_tile, -1)
        if WIDE:
            position = position.to(tl.int64)
            rank_position = rank_position.to(tl.int64)
        pixel = tl.max_contiguous(position * dim + channel[None, None, :], (1, SPLITS, DB))
        x = tl.load(x_ptr + pixel, mask=has_channel[None, None, :], other=0.0).to(tl.float32)
        # A pretended contiguity: the compiler deals the axes out to threads in its order, the first one last.
        projection = tl.max_contiguous(position * (4 * E) + (route * E + R)[None, None, :], (1, SPLITS, 2 * DB))
        rank_pixel = rank_position * (4 * E) + rank_column[None, :]
        low_rank = tl.load(x_dbl_ptr + rank_pixel, mask=has_rank[None, :], other=0.0)
        # All that a tile needs is loaded before the product, whose barriers would hold later loads back.
        if N == 1:
            B = tl.load(x_dbl_ptr + projection).to(tl.float32)
        if not SUMMARY:
            if N == 1:
                C = tl.load(x_dbl_ptr + projection + 1).to(tl.float32)
            # What is loaded for a step that does not exist is not stored.
            second = tl.where(i < region_tiles // 2, False, has_channel)
            y = tl.load(y_ptr + pixel, mask=second[None, None, :], other=0.0).to(tl.float32)
        delta = tl.dot(low_rank, weight, input_precision=PRECISION)
        delta = by_column(delta, ROWS, SPLITS, 2 * DB) + bias[None, None, :]
        delta = softplus_log2(tl.where(exists, delta, -1e4), EXACT, NVIDIA)
        delta_x = delta * x
        if SUMMARY:
            total += tl.sum(tl.sum(delta, axis=0), axis=0)
        for n in range(N):
            a = tl.load(A_ptr + parameter * N + n).to(tl.float32)
            if N > 1:
                B = tl.load(x_dbl_ptr + projection + n).to(tl.float32)
            if N > 1 and SUMMARY:
                carry = tl.load(end_ptr + n * dim, mask=tl.where(i > 0, has_channel, False), other=0.0)
            elif N > 1:
                carry = tl.load(carry_ptr + n * dim, mask=has_channel, other=0.0)
            decay = tl.exp2(delta * a[None, None, :])
            before_tile = carry[None, :]
            h, before, starts, carry = recur(decay, delta_x * B, carry, ROWS, SPLITS, 2 * DB)
            if SUMMARY:
                tl.store(end_ptr + n * dim, carry, mask=has_channel)
            else:
                if N > 1:
                    C = tl.load(x_dbl_ptr + projection + (N + n)).to(tl.float32)
                y += C * h
                if N > 1:
                    tl.store(carry_ptr + n * dim, carry, mask=has_channel)
                if STATES > 0:
                    stored = has_channel[None, :] & (state_tile >= 0)
                    target = state_ptr[None, :] + (state_tile.to(tl.int64) * N + n) * dim
                    tl.store(target, before_tile if STATES == 1 else starts, mask=stored)
        if not SUMMARY:
            tl.store(y_ptr + pixel, y.to(y_ptr.dtype.element_ty), mask=exists & has_channel[None, None, :])
    if SUMMARY:
        tl.store(sum_ptr + (scan * regions + region) * dim + channel, total, mask=has_channel)
