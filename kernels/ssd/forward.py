"""Triton kernels of the SSD's forward pass, and of the states between chunks in both passes."""

from .._device import LOG2_E, sigmoid
from .._launch import tl, triton
from .tiles import (
    add_dot,
    chunk_of,
    dot,
    limited,
    load_rows,
    load_skip,
    load_sums,
    program_of,
    sequences_of,
    state_places,
    store_rows,
    unlimited,
)


@triton.jit
def step_kernel(
    dt,  # [batch, L, H], by its strides
    A,  # [H]
    dt_bias,  # [H], or None
    steps,  # [batch, H, chunks, 2, BLOCK_L]: written, see below
    length,
    heads,
    dt_strides,
    BLOCK_H: tl.constexpr,
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """Step sizes of a chunk, and the sums of the exponents (base 2) of their decays from its first step to each one."""
    BLOCK_L: tl.constexpr = tile.block_l
    blocks = tl.cdiv(heads, BLOCK_H)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    chunk = tl.program_id(1)
    has_head = head < heads
    first, offset, exists = chunk_of(chunk, length, flags, BLOCK_L)
    inside = exists[:, None] & has_head[None, :]
    dt += batch * dt_strides[0] + first * dt_strides[1]
    places = offset[:, None] * dt_strides[1] + head.to(offset.dtype)[None, :] * dt_strides[2]
    size = tl.load(dt + places, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_L, BLOCK_H]
    if dt_bias is not None:
        size += tl.load(dt_bias + head, mask=has_head, other=0.0).to(tl.float32)[None, :]
    size = tl.where(inside, limited(unlimited(size, flags), flags), 0.0)
    rate = tl.load(A + head, mask=has_head, other=0.0).to(tl.float32) * LOG2_E
    sums = tl.cumsum(size * rate[None, :], axis=0)
    rows = ((batch * heads + head) * tl.num_programs(1) + chunk) * (2 * BLOCK_L)
    targets = steps + rows[None, :] + tl.arange(0, BLOCK_L)[:, None]
    tl.store(targets, size, mask=has_head[None, :])
    tl.store(targets + BLOCK_L, sums, mask=has_head[None, :])


@triton.jit
def state_kernel(
    x,  # [batch, L, H, P], by its strides: x, or with ADJOINT the gradient of y
    z,  # the same, or None: gate of the gradient of y
    B,  # [batch, L, G, N], by its strides: B, or with ADJOINT C
    steps,  # [batch, H, chunks, 2, BLOCK_L], of `step_kernel`
    sequence,  # [batch, L], or None
    initial,  # [batch, H, P, N], or None: the first state, in walking order
    ends,  # [batch, H, segments - 1, P, N]: the state after each segment from zero before it; with SUMMARY written
    totals,  # [batch, H, segments - 1]: the exponent of a segment's decay; with SUMMARY written
    states,  # [batch, chunks, H, P, N]: written, the state before each chunk, or None
    last,  # [batch, H, P, N]: written, the last state, or None
    length,
    heads,
    share,
    segment_chunks,
    x_strides,
    z_strides,
    B_strides,
    ADJOINT: tl.constexpr,
    SUMMARY: tl.constexpr,
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """One program walks the chunks of a segment for a block of a head's state [P, N]; `share` heads have a group.

    ADJOINT walks G <- decay * G + sum_i decay_i grad_y_i C_i^T from the last chunk to the first: then the state before
    a chunk is the gradient of the state after its last step. With SUMMARY a segment starts from zero, and no state is
    written but the last one, to `ends`.
    """
    BLOCK_L: tl.constexpr = tile.block_l
    P: tl.constexpr = tile.dim
    N: tl.constexpr = tile.dstate
    chunks = tl.cdiv(length, BLOCK_L)
    blocks_p: tl.constexpr = (P + tile.block_p - 1) // tile.block_p
    blocks_n: tl.constexpr = (N + tile.block_n - 1) // tile.block_n
    program = tl.program_id(0)
    p = program % blocks_p * tile.block_p + tl.arange(0, tile.block_p)
    n = program // blocks_p % blocks_n * tile.block_n + tl.arange(0, tile.block_n)
    row = (program // (blocks_p * blocks_n)).to(tl.int64)
    batch, head = row // heads, row % heads
    own, place, inside = state_places(row, p, n, tile)
    segment = tl.program_id(1)
    segments = tl.num_programs(1)
    state = tl.zeros([tile.block_p, tile.block_n], tl.float32)
    decay_sum = 0.0
    if not SUMMARY:
        if initial is not None:
            state = tl.load(initial + own + place, mask=inside, other=0.0).to(tl.float32)
        ends += row * ((segments - 1) * (P * N))
        totals += row * (segments - 1)
        for before in range(segment):
            end = tl.load(ends + tl.cast(before, tl.int64) * (P * N) + place, mask=inside, other=0.0)
            state = tl.exp2(tl.load(totals + before)) * state + end
    begin = segment * segment_chunks
    for i in range(begin, tl.minimum(begin + segment_chunks, chunks)):
        chunk = chunks - 1 - i if ADJOINT else i
        if not SUMMARY:
            target, _, _ = state_places((batch * chunks + chunk) * heads + head, p, n, tile)
            tl.store(states + target + place, state.to(states.dtype.element_ty), mask=inside)
        positions = chunk_of(chunk, length, flags, BLOCK_L)
        size, sums, total = load_sums(steps, row, chunk, chunks, BLOCK_L)
        weight = tl.exp2(sums) if ADJOINT else tl.exp2(total - sums) * size
        if sequence is not None:
            here, first, final = sequences_of(sequence, batch, chunk, length, BLOCK_L)
            weight = tl.where(here == (first if ADJOINT else final), weight, 0.0)
            total = tl.where(first == final, total, -float('inf'))
        rows = load_rows(x, x_strides, batch, head, positions, p, P).to(tl.float32)  # [BLOCK_L, BLOCK_P]
        if z is not None:
            gate = load_rows(z, z_strides, batch, head, positions, p, P).to(tl.float32)
            rows *= gate * sigmoid(gate)
        b = load_rows(B, B_strides, batch, head // share, positions, n, N)  # [BLOCK_L, BLOCK_N]
        state = add_dot(state * tl.exp2(total), tl.trans(rows * weight[:, None]), b, flags)
        decay_sum += total
    if SUMMARY:
        slot = row * segments + segment
        tl.store(ends + slot * (P * N) + place, state, mask=inside)
        tl.store(totals + slot, decay_sum)
    elif last is not None:
        tl.store(last + own + place, state, mask=inside & (segment == segments - 1))


@triton.jit(do_not_specialize=['share'])  # see `Run`
def output_kernel(
    x,  # [batch, L, H, P], by its strides
    B,  # [batch, L, G, N], by its strides
    C,  # the same
    D,  # [H], or [H, P], or None
    z,  # as x, or None
    steps,  # [batch, H, chunks, 2, BLOCK_L], of `step_kernel`
    sequence,  # [batch, L], or None
    states,  # [batch, chunks, H, P, N], the state before each chunk
    y,  # as x: written
    share,
    sizes,  # length, heads, split_heads
    x_strides,
    B_strides,
    C_strides,
    z_strides,
    y_strides,
    D_STRIDE: tl.constexpr,
    tile,  # `Tile` of constants
    flags,  # `Flags` of constants
):
    """One program computes a chunk of y for `split_heads` of the heads of a group."""
    BLOCK_L: tl.constexpr = tile.block_l
    P: tl.constexpr = tile.dim
    N: tl.constexpr = tile.dstate
    p = tl.arange(0, tile.block_p)
    n = tl.arange(0, tile.block_n)
    chunk = tl.program_id(1)
    chunks = tl.num_programs(1)
    length, heads, split_heads = sizes
    batch, group, split = program_of(heads, share, split_heads)
    offset = tl.arange(0, BLOCK_L)
    positions = chunk_of(chunk, length, flags, BLOCK_L)
    sees = offset[:, None] >= offset[None, :]
    if sequence is not None:
        here, first, final = sequences_of(sequence, batch, chunk, length, BLOCK_L)
        sees = sees & (here[:, None] == here[None, :])
    b = load_rows(B, B_strides, batch, group, positions, n, N)  # [BLOCK_L, BLOCK_N]
    c = load_rows(C, C_strides, batch, group, positions, n, N)  # [BLOCK_L, BLOCK_N]
    scores = dot(c, tl.trans(b), flags)  # [BLOCK_L, BLOCK_L]
    begin = split * split_heads
    for k in range(begin, tl.minimum(begin + split_heads, share)):
        head = group * share + k
        size, sums, _ = load_sums(steps, batch * heads + head, chunk, chunks, BLOCK_L)
        decay = tl.exp2(tl.where(sees, sums[:, None] - sums[None, :], -float('inf')))
        source, place, inside = state_places((batch * chunks + chunk) * heads + head, p, n, tile)
        state = tl.load(states + source + place, mask=inside, other=0.0)  # [BLOCK_P, BLOCK_N]
        from_begin = tl.exp2(sums)
        if sequence is not None:
            from_begin = tl.where(here == first, from_begin, 0.0)
        out = dot(c, tl.trans(state), flags) * from_begin[:, None]  # [BLOCK_L, BLOCK_P]
        rows = load_rows(x, x_strides, batch, head, positions, p, P)  # [BLOCK_L, BLOCK_P]
        out = add_dot(out, scores * decay * size[None, :], rows, flags)
        if D is not None:
            skip = load_skip(D, head, p, P, D_STRIDE)
            out += skip[None, :] * rows.to(tl.float32)
        if z is not None:
            gate = load_rows(z, z_strides, batch, head, positions, p, P).to(tl.float32)
            out *= gate * sigmoid(gate)
        store_rows(y, y_strides, batch, head, positions, p, P, out)
