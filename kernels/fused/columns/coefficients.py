"""Triton kernels that lay out B and C for the selective scan's kernels, and that gather gradients of parameters."""

import triton
import triton.language as tl


@triton.jit
def _block(
    rows,
    length,
    padded,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    STATES: tl.constexpr,
):
    """What the program with this number moves: a row, states, and steps of TILES tiles with their positions.

    Returns:
        row, states [STATES, 1], positions [1, TILES * T], which of them exist, and where all lie in tiles [tiles,
        padded N, T] in walking order, as tile, state and step.
    """
    tiles = tl.cdiv(length, T)
    program = tl.program_id(0)
    row = program % rows
    program = program // rows
    blocks = tl.cdiv(padded, STATES)
    state = (program % blocks) * STATES + tl.arange(0, STATES)[:, None]
    step = (program // blocks) * (TILES * T) + tl.arange(0, TILES * T)[None, :]
    reverse = row % 2 if DIRECTIONS == 2 else REVERSE
    position = reverse * (tiles * T - 1) + (1 - 2 * reverse) * step
    return row, state, position, (position >= 0) & (position < length), step // T, step % T


@triton.jit
def _packed_place(step, packed):
    """Where a step of a tile lies: those of bf16 so that words hold steps i and i + 4 of eight, easily taken apart to
    two vectors."""
    return step // 8 * 8 + step % 4 * 2 + step // 4 % 2 if packed.dtype.element_ty == tl.bfloat16 else step


@triton.jit
def pack_kernel(
    B,
    C,
    packed_B,
    packed_C,
    length,
    dstate,
    padded,
    B_rows,
    C_rows,
    B_groups,
    C_groups,
    B_batch,
    B_group,
    B_state,
    B_step,
    C_batch,
    C_group,
    C_state,
    C_step,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    STATES: tl.constexpr,
):
    """B and C [batch, groups, N, L] as [batch, groups, tiles, padded N, T] in walking order, zeros around.

    Of two DIRECTIONS each is a group.
    """
    row, state, position, exists, tile, step = _block(
        B_rows + C_rows, length, padded, DIRECTIONS, REVERSE, T, TILES, STATES
    )
    tiles = tl.cdiv(length, T)
    inside = (state < dstate) & exists
    written = (state < padded) & (tile < tiles)
    target = tile.to(tl.int64) * (padded * T) + state * T
    size = tiles * tl.cast(padded * T, tl.int64)
    state = state.to(tl.int64)
    position = position.to(tl.int64)
    if row < B_rows:
        B += (row // B_groups).to(tl.int64) * B_batch + (row % B_groups).to(tl.int64) * B_group
        b = tl.load(B + state * B_state + position * B_step, mask=inside, other=0.0)
        target += row * size + _packed_place(step, packed_B)
        tl.store(packed_B + target, b.to(packed_B.dtype.element_ty), mask=written)
    else:
        row -= B_rows
        C += (row // C_groups).to(tl.int64) * C_batch + (row % C_groups).to(tl.int64) * C_group
        c = tl.load(C + state * C_state + position * C_step, mask=inside, other=0.0)
        target += row * size + _packed_place(step, packed_C)
        tl.store(packed_C + target, c.to(packed_C.dtype.element_ty), mask=written)


@triton.jit
def unpack_kernel(
    partial,
    grad_B,
    grad_C,
    length,
    dstate,
    padded,
    B_rows,
    C_rows,
    B_groups,
    C_groups,
    B_batch,
    B_group,
    B_state,
    B_step,
    C_batch,
    C_group,
    C_state,
    C_step,
    partial_rows,
    B_share,
    C_share,
    splits,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    T: tl.constexpr,
    TILES: tl.constexpr,
    STATES: tl.constexpr,
):
    """Sums partial [splits, partial_rows, tiles, padded N, 2, T] to gradients of B and C [batch, own groups, N, L].

    Each of their groups is the sum of B_share and C_share of the rows, which are batch by groups.
    """
    row, state, position, exists, tile, step = _block(
        B_rows + C_rows, length, padded, DIRECTIONS, REVERSE, T, TILES, STATES
    )
    tiles = tl.cdiv(length, T)
    inside = (state < dstate) & exists
    of_C = row >= B_rows
    share = tl.where(of_C, C_share, B_share)
    row = tl.where(of_C, row - B_rows, row)
    source = tile.to(tl.int64) * (padded * 2 * T) + (state * (2 * T) + step) + tl.where(of_C, T, 0)
    size = tiles * tl.cast(padded * 2 * T, tl.int64)
    total = tl.zeros(inside.shape, tl.float32)
    for split in range(splits):
        for member in range(share):
            rows = split * partial_rows + row * share + member
            total += tl.load(partial + rows * size + source, mask=inside, other=0.0)
    state = state.to(tl.int64)
    position = position.to(tl.int64)
    if of_C:
        grad_C += (row // C_groups).to(tl.int64) * C_batch + (row % C_groups).to(tl.int64) * C_group
        place = state * C_state + position * C_step
        tl.store(grad_C + place, total.to(grad_C.dtype.element_ty), mask=inside)
    else:
        grad_B += (row // B_groups).to(tl.int64) * B_batch + (row % B_groups).to(tl.int64) * B_group
        place = state * B_state + position * B_step
        tl.store(grad_B + place, total.to(grad_B.dtype.element_ty), mask=inside)


@triton.jit
def _store_rows(target, total, row, rows, channel, row_stride, channel_stride, inside):
    """Stores what belongs to the rows 0 ... rows of a target."""
    place = row * row_stride + channel * channel_stride
    tl.store(target + place, total, mask=inside & (row >= 0) & (row < rows))


@triton.jit
def total_kernel(
    sums,
    grad_D,
    grad_bias,
    grad_A,
    grad_B,
    grad_C,
    count,
    chunks,
    dim,
    dstate,
    sum_rows,
    HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CONSTANT_B: tl.constexpr,
    CONSTANT_C: tl.constexpr,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums sums [batch, directions, chunks, sum_rows, dim], see `scan_backward_kernel`, to fp32 [directions, dim] and
    [directions, dim, N]; `count` is that of the batch times chunks."""
    direction = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < sum_rows * dim
    total = tl.zeros([COLUMNS], tl.float32)
    for begin in range(0, count, COUNT):
        index = begin + tl.arange(0, COUNT)
        source = (index // chunks * tl.num_programs(1) + direction) * chunks + index % chunks
        source = source.to(tl.int64)[:, None] * (sum_rows * dim) + column[None, :]
        total += tl.sum(tl.load(sums + source, mask=(index < count)[:, None] & inside[None, :], other=0.0), axis=0)
    row = column // dim
    channel = column % dim
    if HAS_D:
        _store_rows(grad_D + direction * dim, total, row, 1, channel, 0, 1, inside)
    if HAS_BIAS:
        _store_rows(grad_bias + direction * dim, total, row - 1, 1, channel, 0, 1, inside)
    _store_rows(grad_A + direction * (dim * dstate), total, row - 2, dstate, channel, 1, dstate, inside)
    if CONSTANT_B:
        _store_rows(grad_B, total, row - 2 - dstate, dstate, channel, 1, dstate, inside)
    if CONSTANT_C:
        _store_rows(grad_C, total, row - 2 - 2 * dstate, dstate, channel, 1, dstate, inside)
