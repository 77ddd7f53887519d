"""Triton kernels that lay out B and C for the scans, and that gather their gradients."""

from .._launch import tl, triton


@triton.jit
def _block_of_program(rows, length, padded, DIRECTIONS: tl.constexpr, REVERSE: tl.constexpr, block):
    """What a program moves: a row, states, and steps of some tiles with their positions.

    Returns:
        row, states [BLOCK_N, 1], positions [1, TILES * PACKED], which of them exist, and where all lie in tiles [tiles,
        padded N, PACKED] in walking order, as tile and step.
    """
    PACKED: tl.constexpr = block.packed
    STEPS: tl.constexpr = block.tiles * block.packed
    tiles = tl.cdiv(length, PACKED)
    program = tl.program_id(0)
    row = program % rows
    program = program // rows
    blocks = tl.cdiv(padded, block.block_n)
    state = (program % blocks) * block.block_n + tl.arange(0, block.block_n)[:, None]
    step = (program // blocks) * STEPS + tl.arange(0, STEPS)[None, :]
    reverse = row % 2 if DIRECTIONS == 2 else REVERSE
    position = reverse * (tiles * PACKED - 1) + (1 - 2 * reverse) * step
    return row, state, position, (position >= 0) & (position < length), step // PACKED, step % PACKED


@triton.jit
def _packed_place(step, packed):
    """Where a step of a tile lies: those of bf16 so that words hold steps i and i + 4 of eight, easily taken apart to
    two vectors."""
    return step // 8 * 8 + step % 4 * 2 + step // 4 % 2 if packed.dtype.element_ty == tl.bfloat16 else step


@triton.jit
def pack_kernel(
    B,  # [batch, groups, N, L], by its strides
    C,  # the same
    packed_B,  # [batch, groups, tiles, padded N, PACKED]: written, in walking order, zeros around
    packed_C,  # the same
    length,
    dstate,
    padded,
    rows,
    groups,
    B_strides,
    C_strides,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    block,  # `MoveBlock` of constants
):
    """Lays out B and C, each of which has `rows` = batch * groups rows. Of two DIRECTIONS each is a group."""
    row, state, position, exists, tile, step = _block_of_program(2 * rows, length, padded, DIRECTIONS, REVERSE, block)
    PACKED: tl.constexpr = block.packed
    tiles = tl.cdiv(length, PACKED)
    inside = (state < dstate) & exists
    written = (state < padded) & (tile < tiles)
    target = tile.to(tl.int64) * (padded * PACKED) + state * PACKED
    size = tiles * tl.cast(padded * PACKED, tl.int64)
    state = state.to(tl.int64)
    position = position.to(tl.int64)
    if row < rows:
        B += (row // groups).to(tl.int64) * B_strides[0] + (row % groups).to(tl.int64) * B_strides[1]
        b = tl.load(B + state * B_strides[2] + position * B_strides[3], mask=inside, other=0.0)
        target += row * size + _packed_place(step, packed_B)
        tl.store(packed_B + target, b.to(packed_B.dtype.element_ty), mask=written)
    else:
        row -= rows
        C += (row // groups).to(tl.int64) * C_strides[0] + (row % groups).to(tl.int64) * C_strides[1]
        c = tl.load(C + state * C_strides[2] + position * C_strides[3], mask=inside, other=0.0)
        target += row * size + _packed_place(step, packed_C)
        tl.store(packed_C + target, c.to(packed_C.dtype.element_ty), mask=written)


@triton.jit
def unpack_kernel(
    partial,  # [splits, batch, groups, tiles, padded N, 2, PACKED], B's before C's
    grad_B,  # [batch, groups, N, L], by its strides: written
    grad_C,  # the same
    length,
    dstate,
    padded,
    rows,
    groups,
    splits,
    B_strides,
    C_strides,
    DIRECTIONS: tl.constexpr,
    REVERSE: tl.constexpr,
    block,  # `MoveBlock` of constants
):
    """Sums the parts of the gradients of B and C."""
    row, state, position, exists, tile, step = _block_of_program(2 * rows, length, padded, DIRECTIONS, REVERSE, block)
    PACKED: tl.constexpr = block.packed
    tiles = tl.cdiv(length, PACKED)
    inside = (state < dstate) & exists
    of_C = row >= rows
    row = tl.where(of_C, row - rows, row)
    source = tile.to(tl.int64) * (padded * 2 * PACKED) + (state * (2 * PACKED) + step) + tl.where(of_C, PACKED, 0)
    size = tiles * tl.cast(padded * 2 * PACKED, tl.int64)
    total = tl.zeros(inside.shape, tl.float32)
    for split in range(splits):
        total += tl.load(partial + (split * rows + row) * size + source, mask=inside, other=0.0)
    state = state.to(tl.int64)
    position = position.to(tl.int64)
    if of_C:
        grad_C += (row // groups).to(tl.int64) * C_strides[0] + (row % groups).to(tl.int64) * C_strides[1]
        place = state * C_strides[2] + position * C_strides[3]
        tl.store(grad_C + place, total.to(grad_C.dtype.element_ty), mask=inside)
    else:
        grad_B += (row // groups).to(tl.int64) * B_strides[0] + (row % groups).to(tl.int64) * B_strides[1]
        place = state * B_strides[2] + position * B_strides[3]
        tl.store(grad_B + place, total.to(grad_B.dtype.element_ty), mask=inside)
