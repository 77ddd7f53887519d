"""Forward scans of SS2D along the four routes of a map.

VMamba: Visual State Space Model, https://arxiv.org/abs/2401.10166
"""

from .._device import LOG2_E, softplus_log2
from .._launch import tl, triton
from .routes import (
    arriving_state,
    by_column,
    line_of,
    load_low_rank,
    load_pair,
    offsets_of,
    projections_at,
    recur,
    route_of_pair,
    walk,
)

# Known alignment would make the compiler deal neighbouring channels, and steps, out to threads in vectors.
_UNALIGNED = ['x', 'x_dbl', 'y', 'dim']
# Whether these are multiples of 16 changes nothing: maps of any size run on the same compiled kernel.
_UNALIGNED += ['height', 'width', 'magic', 'chunks', 'chunk_tiles', 'num_states']


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def scan_kernel(
    x,  # [B, L, D]
    x_dbl,  # [B, L, 4, R + 2N]
    dt_weight,  # [4, D, R]
    dt_bias,  # [4, D]
    A,  # [4, D, N]
    y,  # [2, B, L, D]: written, sums of <C, h> / ln 2 over both routes by rows, and over both by columns
    states,  # [B, 4, num_states, N, D]: written, states / ln 2 for the backward pass; see SAVED
    carries,  # [B, 4, chunks, N, D]: where states wait between tiles
    ends,  # [B, 4, chunks, N, D]: state / ln 2 at the end of a chunk from a start at zero
    sums,  # [B, 4, chunks, D]: sum of dt / ln 2 over a chunk
    height,
    width,
    dim,
    magic,
    chunks,
    chunk_tiles,
    num_states,
    SAVED: tl.constexpr,
    SUMMARY: tl.constexpr,
    ranks,  # `Ranks` of constants
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """One program walks one chunk of a pair of opposite routes, for one entry of the batch and BLOCK_D channels.

    Of the two routes the first to reach a tile writes its output, the second adds to it. SAVED is how many tiles of the
    backward pass a tile holds whose first states are saved: none, one or SPLITS. With SUMMARY only `ends` and `sums`
    are written; without, they are read.
    """
    R: tl.constexpr = ranks.rank
    BLOCK_R: tl.constexpr = ranks.block_r
    N: tl.constexpr = ranks.dstate
    STEPS: tl.constexpr = tile.steps
    SPLITS: tl.constexpr = tile.splits
    BLOCK_D: tl.constexpr = tile.block_d
    WRAP: tl.constexpr = flags.wrap
    WIDE: tl.constexpr = flags.wide
    plane = (height, width, magic)
    pid = tl.program_id(0)
    channel_blocks = tl.cdiv(dim, BLOCK_D)
    block = pid % channel_blocks
    pair = (pid // channel_blocks) % 2
    chunk = (pid // channel_blocks // 2) % chunks
    batch = (pid // channel_blocks // 2 // chunks).to(tl.int64)
    E: tl.constexpr = R + 2 * N
    BLOCK_L: tl.constexpr = STEPS * SPLITS
    seqlen = height * width

    line, _, _, route_magic, tiles, lines = route_of_pair(pair, plane, BLOCK_L, WRAP)

    column = tl.arange(0, 2 * BLOCK_D)
    backward = column // BLOCK_D
    route = pair + 2 * backward
    # Columns beyond the last channel repeat it; only what they store is masked.
    has_channel = block * BLOCK_D + column % BLOCK_D < dim
    channel = tl.minimum(block * BLOCK_D + column % BLOCK_D, dim - 1)
    parameter = route * dim + channel

    # The projections of dt of both routes are one product with a block-diagonal matrix.
    rank = tl.arange(0, 2 * BLOCK_R)
    rank_backward = rank // BLOCK_R
    rank_column = (pair + 2 * rank_backward) * E + rank % BLOCK_R
    has_rank = rank % BLOCK_R < R
    same_route = has_rank[:, None] & (rank_backward[:, None] == backward[None, :])
    x += batch * seqlen * dim
    batches = tl.num_programs(0) // channel_blocks // 2 // chunks
    y += (pair * batches + batch) * seqlen * dim
    x_dbl += batch * seqlen * (4 * E)
    place = parameter[None, :] * R + (rank % BLOCK_R)[:, None]
    weight = tl.load(dt_weight + place, mask=same_route, other=0.0)  # [2 * BLOCK_R, 2 * BLOCK_D]
    weight = (weight.to(tl.float32) * LOG2_E).to(x_dbl.dtype.element_ty)
    bias = tl.load(dt_bias + parameter).to(tl.float32) * LOG2_E  # [2 * BLOCK_D]

    scan = batch * 4 + route
    states += scan * num_states * (N * dim) + channel
    carries += (scan * chunks + chunk) * (N * dim) + channel
    order = tl.where(backward == 0, chunk, chunks - 1 - chunk)
    split = tl.arange(0, SPLITS)[:, None]
    carry = tl.zeros([SPLITS, 2 * BLOCK_D], tl.float32)
    if SUMMARY:
        ends += (scan * chunks + chunk) * (N * dim) + channel
    else:
        for n in range(N):
            a = tl.load(A + parameter * N + n).to(tl.float32)  # [2 * BLOCK_D]
            first_end = ends + scan * (chunks * N * dim) + n * dim + channel
            first_sum = sums + scan * (chunks * dim) + channel
            start = arriving_state(a, first_end, N * dim, first_sum, dim, order, backward, chunks, has_channel)
            if N > 1:
                tl.store(carries + n * dim, start, mask=has_channel)
            carry = tl.broadcast_to(start[None, :], [SPLITS, 2 * BLOCK_D])
    if N == 1:
        a = tl.load(A + parameter).to(tl.float32)  # [2 * BLOCK_D]
    total = tl.zeros([STEPS, SPLITS, 2 * BLOCK_D], tl.float32)
    row = tl.arange(0, BLOCK_L)
    rank_backward = rank_backward[None, :]
    rank_offset = offsets_of(rank_backward, ((row % SPLITS) * STEPS + row // SPLITS)[:, None], BLOCK_L)
    count = tl.arange(0, SPLITS)[None, :, None] * STEPS + tl.arange(0, STEPS)[:, None, None]
    offset = offsets_of(backward[None, None, :], count, BLOCK_L)
    first_tile = chunk * chunk_tiles
    last_tile = first_tile + chunk_tiles - 1
    # The product at the start of a tile is of what is loaded a tile ahead, so that nothing waits for it.
    low_ranks = x_dbl + rank_column[None, :]
    next_low_rank = load_low_rank(
        low_ranks, has_rank, rank_offset, rank_backward, first_tile, last_tile, pair, plane, 4 * E, BLOCK_L, WRAP, WIDE
    )
    for i in range(0, chunk_tiles):
        if not SUMMARY or N > 1:
            # Half way each route enters tiles that the other one has written; and states pass through memory.
            if N > 1 or i == chunk_tiles // 2:
                tl.debug_barrier()
        position, exists = walk(
            offset, backward[None, None, :], first_tile + i, last_tile - i, pair, plane, BLOCK_L, WRAP
        )
        position = tl.max_constancy(position, (1, 1, BLOCK_D))
        if SAVED > 0:
            state_tile = tl.where(backward == 0, first_tile + i, last_tile - i)
            state_tile = tl.where(state_tile < tiles * lines, state_tile, -1)[None, :]
            if SAVED > 1:
                # A tile starts SAVED tiles of the backward pass, of which the last of a line may hold no step.
                part = tl.arange(0, SAVED)[:, None]
                part = tl.where(backward[None, :] == 0, part, SAVED - 1 - part)
                line_of_tile = state_tile * 0 if WRAP else line_of(state_tile, route_magic, tiles)
                part += (state_tile - line_of_tile * tiles) * SAVED
                tiles_of_line = tl.cdiv(seqlen if WRAP else line, BLOCK_L // SAVED)
                state_part = line_of_tile * tiles_of_line + part
                state_tile = tl.where((state_tile >= 0) & (part < tiles_of_line), state_part, -1)
        if WIDE:
            position = position.to(tl.int64)
        pixel = tl.max_contiguous(position * dim + channel[None, None, :], (1, SPLITS, BLOCK_D))
        u = tl.load(x + pixel).to(tl.float32)  # [STEPS, SPLITS, 2 * BLOCK_D]
        low_rank = next_low_rank
        ahead = tl.minimum(i + 1, chunk_tiles - 1)
        next_low_rank = load_low_rank(
            low_ranks,
            has_rank,
            rank_offset,
            rank_backward,
            first_tile + ahead,
            last_tile - ahead,
            pair,
            plane,
            4 * E,
            BLOCK_L,
            WRAP,
            WIDE,
        )
        # All that a tile needs is loaded before the product, whose barriers would hold later loads back.
        if N == 1:
            B, C = load_pair(x_dbl, position, route, R, E, SPLITS, 2 * BLOCK_D)
        else:
            projection = projections_at(position, route * E + R, 4 * E, SPLITS, 2 * BLOCK_D)
        if not SUMMARY:
            # What is loaded for a step that does not exist is not stored.
            second = tl.where(i >= chunk_tiles // 2, column >= 0, False)
            out = tl.load(y + pixel, mask=second[None, None, :], other=0.0).to(tl.float32)
        dt = tl.dot(low_rank, weight, input_precision=flags.precision)
        dt, u = by_column(dt, u, STEPS, SPLITS, 2 * BLOCK_D)
        dt += bias[None, None, :]
        dt = softplus_log2(tl.where(exists, dt, -1e4), flags.exact, flags.nvidia)
        dt_u = dt * u
        if SUMMARY:
            total += dt
        for n in range(N):
            if N > 1:
                a = tl.load(A + parameter * N + n).to(tl.float32)  # [2 * BLOCK_D]
                B = tl.load(x_dbl + projection + n).to(tl.float32)  # [STEPS, SPLITS, 2 * BLOCK_D]
            if N > 1 and SUMMARY:
                started = tl.where(i > 0, has_channel, False)
                carry = tl.load(ends[None, :] + n * dim + 0 * split, mask=started[None, :], other=0.0)
            elif N > 1:
                carry = tl.load(carries[None, :] + n * dim + 0 * split)  # [SPLITS, 2 * BLOCK_D]
            decay = tl.exp2(dt * a[None, None, :])
            before_tile = carry
            h, before, starts, carry = recur(decay, dt_u * B, carry, STEPS, SPLITS, 2 * BLOCK_D)
            if SUMMARY:
                tl.store(ends[None, :] + n * dim + 0 * split, carry, mask=has_channel[None, :] & (split == 0))
            else:
                if N > 1:
                    C = tl.load(x_dbl + projection + (N + n)).to(tl.float32)  # [STEPS, SPLITS, 2 * BLOCK_D]
                out += C * h
                if N > 1:
                    target = carries[None, :] + n * dim + 0 * split
                    tl.store(target, carry, mask=has_channel[None, :] & (split == 0))
                if SAVED > 0:
                    stored = has_channel[None, :] & (state_tile >= 0) & (split < SAVED)
                    target = states[None, :] + (state_tile.to(tl.int64) * N + n) * dim + 0 * split
                    tl.store(target, before_tile if SAVED == 1 else starts, mask=stored)
        if not SUMMARY:
            tl.store(y + pixel, out.to(y.dtype.element_ty), mask=exists & has_channel[None, None, :])
    if SUMMARY:
        total = tl.sum(tl.sum(total, axis=0), axis=0)
        tl.store(sums + (scan * chunks + chunk) * dim + channel, total, mask=has_channel)
